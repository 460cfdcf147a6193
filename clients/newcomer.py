"""A client that comes after a run, and makes an adapter of its own from what the run has left."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from clients.session import Session, Site
from fedsb.training.fusion import fuse
from fedsb.training.loop import learning_rate, personal_plan

FUSION_RATE = 5e-2  # of coefficients, of which an adapter alone is 1
SHARED = "the global core"  # in the pool; no site's name has a blank


def personalised(
    session: Session, site: Site, pool: Mapping[str, Mapping[str, Tensor]], how: str, steps: int
) -> tuple[Tensor, str]:
    """A new state (size,), and how it came about.

    Args:
        session: with the run's basis.
        site: the client.
        pool: name → state; `SHARED` is among them.
        how: "fusion": a mixture of the pool, from the one that fits the client's examples best; "core": on from the global core,
            at the rate of `[personal]`; "scratch": from the base model, at the rate of training.
        steps: of AdamW.
    """
    plan = replace(personal_plan(session.config), count=steps)
    if how != "fusion":
        if how == "scratch":
            head = session.config.train.head_learning_rate
            plan = replace(plan, learning_rate=learning_rate(session.config), head_learning_rate=head)
        start = session.base_vector() if how == "scratch" else session.layout.flatten(pool[SHARED])
        return session.train(site, start, plan).vector, "a core of its own" + (" from the global one" if how == "core" else "")
    losses = {name: session.loss(site, session.layout.flatten(state)) for name, state in pool.items()}
    best = min(losses, key=lambda name: losses[name])
    names = list(pool)
    state, _ = fuse(
        session.model,
        session.transformer,
        [pool[name] for name in names],
        names.index(best),
        session.rows(site, "train"),
        replace(plan, learning_rate=FUSION_RATE),
        kind=session.config.model.kind,
        pad_id=session.tokenizer.pad_token_id,
        seed=session.config.seed,
        client=site.name,
    )
    return session.layout.flatten(state), f"a mixture of {len(names)} cores, begun at that of {best}"
