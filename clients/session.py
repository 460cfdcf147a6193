"""What a client's process keeps between messages: base model, basis, tokenised data. One session serves every client of
a simulation; on a real site there is one client to it."""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedsb.adapters.attach import attach, give_basis, initial_state, layout_of, model_section
from fedsb.adapters.folding import fold_into
from fedsb.adapters.instances import Encoder, encoder_of, identity_of
from fedsb.adapters.method import Around, wholly
from fedsb.adapters.methods import METHODS
from fedsb.adapters.share import Share, heads_of, kept_names, share_of
from fedsb.adapters.state import get_state, layers_of, parameters_of, set_state
from fedsb.basis.frames import Basis, Fold, folded_fingerprint
from fedsb.config import RunConfig
from fedsb.data.batches import Encoded, draw, encode, with_instances
from fedsb.data.examples import Example
from fedsb.data.sites import client_data
from fedsb.data.tasks import Split, labels_of
from fedsb.errors import BasisError, FedsbError
from fedsb.models import device_of, load_extractor, load_model, load_tokenizer, locate
from fedsb.privacy.clipping import clip
from fedsb.privacy.mechanism import Mechanism
from fedsb.privacy.noise import KeyStream, add_noise
from fedsb.sections import SITE_NAME
from fedsb.serving.evaluator import Score, evaluate, loss_on, require
from fedsb.store.basis_files import load_basis, save_basis
from fedsb.training.drift import Control
from fedsb.training.loop import Plan, train
from fedsb.training.private import train_private
from fedsb.training.sketch import Sketcher
from fedsb.training.start import build_basis, can_rebuild, sketch_plan

KEPT_SPLITS = 64  # of clients' data, as examples and as tokens, that are kept at one time


@dataclass(frozen=True)
class Site:
    """One client: its name, its place in the partition, and the folder where it keeps what must outlive a process.

    Raises FedsbError if the name is none: it stands in paths.
    """

    name: str
    index: int
    folder: Path

    def __post_init__(self) -> None:
        """Check the name."""
        if not SITE_NAME.fullmatch(self.name):
            raise FedsbError(f"{self.name!r} is no name of a site (a-z, 0-9, dot, dash, underscore); choose another")


@dataclass(frozen=True)
class Trained:
    """What local training brought: the state (size,) fp32, mean loss in nats, number of training examples, seconds."""

    vector: Tensor
    loss: float
    examples: int
    seconds: float


class Session:
    """The frozen model with its adapter, and what to do with it. Everything it computes depends on its arguments alone, except
    `train_private` and `sketch_private`, whose noise nobody can know."""

    def __init__(self, config: RunConfig) -> None:
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self.config = config
        self.device = device_of(config.runtime.device)
        self.source, encoder = locate(config.model.source), encoder_of(config)
        self.identity = identity_of(self.source, encoder)
        self.encoder = Encoder(encoder) if encoder else None
        self.tokenizer = load_tokenizer(self.source)
        self.extractor = load_extractor(self.source) if config.model.kind == "speech" else None
        model = load_model(self.source, model_section(config), len(labels_of(config)) or None, self.device)
        self.model = attach(model, config, self.tokenizer)
        self.transformer = self.model.get_base_model()
        self.parameters = parameters_of(self.model)
        self.layout = layout_of(self.model)
        self.kept = kept_names(self.layout, METHODS[config.adapter.method])
        self.basis = ""
        self.folds: Sequence[Fold] = ()
        self.pristine: dict[str, Tensor] = {}
        self.examples = lru_cache(maxsize=KEPT_SPLITS)(self._examples)
        self.rows = lru_cache(maxsize=KEPT_SPLITS)(self._rows)

    def prepare(self, site: Site, wanted: str, sent: Basis | None = None) -> str:
        """Get hold of a basis: the one sent, the one at hand, the one on disk, or one built anew.

        Returns its fingerprint; "" if there is none that would outlive this process.
        """
        at_hand, on_disk = self.basis == wanted, _basis_file(site, wanted).exists()
        if sent is not None and not (at_hand and on_disk and sent.fingerprint == wanted):
            self._take(site, sent)
        elif sent is None and not (at_hand and on_disk) and not self._restore(site, wanted) and can_rebuild(self.config):
            self._take(site, build_basis(self.config, self.model, self.tokenizer, self.device))
        return self.basis if _basis_file(site, self.basis).exists() else ""

    def require(self, site: Site, wanted: str, before: str = "", folds: Sequence[Fold] = ()) -> None:
        """Have the basis that a state belongs to: prepared here, or the one `before` with `folds` on top. Raises BasisError."""
        if self.basis == wanted and _basis_file(site, wanted).exists():
            return
        if not self._restore(site, wanted) and not self._go_on(site, wanted, before, folds):
            raise BasisError(f"{site.name} was never given basis {wanted[:12]}; the server must prepare it first")

    def train(self, site: Site, vector: Tensor, plan: Plan, control: Control | None = None) -> Trained:
        """Train from a state on the client's own examples, with corrected gradients if `control` is given."""
        started = time.monotonic()
        rows = self.rows(site, "train")
        set_state(self.model, self.layout.unflatten(vector))
        loss = train(
            self.transformer,
            self.parameters,
            rows,
            plan,
            kind=self.config.model.kind,
            pad_id=self.tokenizer.pad_token_id,
            seed=self.config.seed,
            client=site.name,
            around=self._around(site),
            control=control,
            kept=self.kept,
        )
        return Trained(self.layout.flatten(get_state(self.model)), loss, len(rows), time.monotonic() - started)

    def train_private(self, site: Site, vector: Tensor, plan: Plan, mechanism: Mechanism) -> Tensor:
        """Train from a state on the client's own examples with privacy for each of them; the new state (size,), fp32."""
        set_state(self.model, self.layout.unflatten(vector))
        train_private(
            self.transformer,
            self.parameters,
            self.rows(site, "train"),
            plan,
            mechanism,
            KeyStream(),
            kind=self.config.model.kind,
            pad_id=self.tokenizer.pad_token_id,
            around=self._around(site),
            kept=self.kept,
        )
        return self.layout.flatten(get_state(self.model))

    def _around(self, site: Site) -> Around:
        around = METHODS[self.config.adapter.method].around
        return around(self.config, self.model, site.name) if around else wholly

    def sketch(self, site: Site) -> Tensor:
        """The sketch (size of the plan,) of the client's first gradient: the mean over `basis.examples` of its examples."""
        rows, config = self.rows(site, "train"), self.config
        drawn = draw(len(rows), 0, min(config.basis.examples, len(rows)), config.seed, site.name)
        return self.sketcher().summed([rows[i] for i in drawn]) / len(drawn)

    def sketch_clipped(self, site: Site, mechanism: Mechanism) -> Tensor:
        """The same, clipped as a whole: the server adds the noise."""
        return clip(self.sketch(site), mechanism.clip_norm).vector

    def sketch_private(self, site: Site, mechanism: Mechanism) -> Tensor:
        """The same with privacy for each example: a noisy sum of clipped sketches over a Poisson sample, divided by how many that
        has on average."""
        rows, stream = self.rows(site, "train"), KeyStream()
        drawn = [rows[i] for i in stream.poisson_sample(len(rows), mechanism.sample_rate)]
        found = self.sketcher().clipped(drawn, mechanism.clip_norm)
        return add_noise(found.vector, mechanism.noise_multiplier * found.bound, stream) / (mechanism.sample_rate * len(rows))

    def sketcher(self) -> Sketcher:
        """What sketches the gradient that training starts from, with the base model's cores and the head of the seed."""
        self.folds, self.basis = (), ""
        fold_into(layers_of(self.model), self.folds, self.pristine)
        set_state(self.model, initial_state(self.layout, self.config.seed))
        layers = {name: layer.get_base_layer() for name, layer in layers_of(self.model).items()}
        plan = sketch_plan(self.config, self.model)
        return Sketcher(plan, layers, self.transformer, self.config.model.kind, self.tokenizer.pad_token_id)

    def score_base(self, site: Site) -> Score:
        """Score the base model, without what was folded into its weights."""
        fold_into(layers_of(self.model), (), self.pristine)
        try:
            return self._score(site, self.base_vector(), prompted=False)
        finally:
            fold_into(layers_of(self.model), self.folds, self.pristine)

    def score(self, site: Site, vector: Tensor) -> Score:
        """Score a state on the client's own test set, or whatever `evaluation.split` says."""
        return self._score(site, vector)

    def _score(self, site: Site, vector: Tensor, *, prompted: bool = True) -> Score:
        split = self.config.evaluation.split
        section, examples, rows = self.config.evaluation, self.examples(site, split), self.rows(site, split)
        if not prompted:
            rows = with_instances(rows, [None] * len(rows))
        set_state(self.model, self.layout.unflatten(vector))
        return evaluate(
            self.transformer,
            examples,
            rows,
            kind=self.config.model.kind,
            tokenizer=self.tokenizer,
            device=self.device,
            batch_size=section.batch_size,
            max_new_tokens=section.max_new_tokens,
        )

    def require_scores(self, site: Site) -> None:
        """Raise what scoring would raise for want of a sandbox, a compiler or a package, before anything is trained."""
        require(self.examples(site, self.config.evaluation.split))

    def loss(self, site: Site, vector: Tensor) -> float:
        """Mean loss (nats) of a state on the client's own training examples; nothing is generated."""
        set_state(self.model, self.layout.unflatten(vector))
        rows, section, kind = self.rows(site, "train"), self.config.evaluation, self.config.model.kind
        return loss_on(self.transformer, rows, kind, self.tokenizer.pad_token_id, self.device, section.batch_size)

    def share(self, site: Site) -> Share:
        """What of a state travels between the server and this client."""
        return share_of(self.layout, self.config.adapter.method, self.config.rank_of(site.name))

    def received(self, site: Site, server_round: int) -> Share:
        """What of the state comes to this client at the beginning of a round."""
        if not METHODS[self.config.adapter.method].in_turn:
            return self.share(site)
        return heads_of(self.layout, self.config.adapter.method, 0, self.config.turn(server_round))

    def returned(self, site: Site, server_round: int) -> Share:
        """What of the state goes back at the end of a round."""
        if not METHODS[self.config.adapter.method].in_turn:
            return share_of(self.layout, self.config.adapter.method, self.config.rank_of(site.name), up=True)
        turn = self.config.turn(server_round)
        return heads_of(self.layout, self.config.adapter.method, turn, turn)

    def published(self, site: Site) -> Share:
        """What of a state this client publishes as its personal adapter."""
        return share_of(self.layout, self.config.adapter.method, self.config.rank_of(site.name), kept=True)

    def base_vector(self) -> Tensor:
        """The base model as a state."""
        return self.layout.flatten(initial_state(self.layout, self.config.seed))

    def task_of(self, site: Site) -> str:
        """The tasks of what a client is scored on, for tables."""
        return "+".join(sorted({example.task for example in self.examples(site, self.config.evaluation.split)}))

    def _examples(self, site: Site, split: Split) -> Sequence[Example]:
        return client_data(self.config, site.name, site.index, split)

    def _rows(self, site: Site, split: Split) -> Sequence[Encoded]:
        data, examples = self.config.data, self.examples(site, split)
        rows = encode(examples, self.tokenizer, data.max_length, data.system_prompt, self.config.model.kind, self.extractor)
        if self.encoder is None:
            return rows
        return with_instances(rows, self.encoder.encode([example.prompt for example in examples]).unbind())

    def use(self, basis: Basis) -> None:
        """Put a basis in place; a state must be loaded afterwards."""
        give_basis(self.model, basis, self.config)
        self.folds, self.basis = basis.folds, ""
        fold_into(layers_of(self.model), self.folds, self.pristine)
        self.basis = basis.fingerprint

    def _take(self, site: Site, basis: Basis) -> None:
        self.use(basis)
        save_basis(site.folder, basis)

    def _restore(self, site: Site, wanted: str) -> bool:
        """Take a basis that was prepared before from the site's disk, if it is there."""
        if not _basis_file(site, wanted).exists():
            return False
        self.use(load_basis(site.folder, wanted))
        return True

    def _go_on(self, site: Site, wanted: str, before: str, folds: Sequence[Fold]) -> bool:
        """Take the basis that comes from one on the site's disk by folding in more, if that is so."""
        if not folds or functools.reduce(folded_fingerprint, folds, before) != wanted or not _basis_file(site, before).exists():
            return False
        held = load_basis(site.folder, before)
        basis = functools.reduce(Basis.fold, folds, held)
        self.use(basis)
        save_basis(site.folder, basis, held)
        return True


def _basis_file(site: Site, fingerprint: str) -> Path:
    return site.folder / "basis" / f"{fingerprint}.safetensors"


@lru_cache(maxsize=1)
def open_session(run: str) -> Session:
    """The session of a run's JSON; the last one stays open in this process."""
    return Session(RunConfig.from_json(run))
