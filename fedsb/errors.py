"""Every error that a user can meet: one sentence that names what, where, and what to do. The command line exits with 2."""


class FedsbError(Exception):
    """What a user did or meets, told in one sentence. Anything else that is raised is a defect of this project."""


class ConfigError(FedsbError):
    """A configuration that cannot be run: an unknown key, a wrong type, values that contradict each other."""


class ModelError(FedsbError):
    """A base model that cannot be found, read, or adapted as asked."""


class DataError(FedsbError):
    """Task data that cannot be read, or a partition that leaves a client with nothing.

    Attributes:
        outside: the sentence as it may leave the site that holds the data, without what it quotes from a row.
    """

    def __init__(self, message: str, quoted: str = "") -> None:
        super().__init__(message)
        self.outside = message.replace(quoted, "…") if quoted else message


class BasisError(FedsbError):
    """A basis that does not fit the model, or that is not the one a core was trained on."""


class AdapterError(FedsbError):
    """An adapter that cannot do what is asked of it, or whose file is not what it should be."""


class CheckpointError(FedsbError):
    """A checkpoint that is torn, or that belongs to another configuration."""


class StoreError(FedsbError):
    """A run folder or adapter store that lacks what was asked for."""


class RequestError(FedsbError):
    """A request to the serving engine that it cannot take."""


class DiskError(FedsbError):
    """The disk refused a write: full, read-only or forbidden."""


class FederationError(FedsbError):
    """Too few clients, or no usable reply, within the time that the configuration allows."""


class ReplyError(FedsbError):
    """One client's reply that must not be counted; the round goes on without it."""


class TrainerError(FedsbError):
    """A site's trainer that is away, died, or does not answer a question."""


class PolicyError(FedsbError):
    """A question that a site's own policy does not allow it to answer."""


class PrivacyError(FedsbError):
    """Something that would cost more privacy than was agreed, or that cannot be done with the privacy asked for."""


class BudgetError(PrivacyError):
    """A release that would spend more than a run's ε or a site's cap; the run goes on without that site."""


class LedgerError(PrivacyError):
    """A ledger that is torn, altered, or of another client or data set."""


class SecureSumError(FedsbError):
    """A secure sum that must not go on: too few clients, other rosters or keys than agreed, a share that is wrong."""


class SandboxError(FedsbError):
    """No sandbox, compiler or interpreter for a generated program; it has not run."""


class KeyFileError(FedsbError):
    """A key or certificate that is not what it should be, or has expired."""


class DeployError(FedsbError):
    """A federation of processes that is not there, cannot be started, or does not answer."""
