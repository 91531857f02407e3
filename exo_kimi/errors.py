"""The exceptions of exo-kimi, one tree: each is raised when ...

ExoKimiError                    everything that exo-kimi raises on purpose
+-- UsageError                  an argument, option or environment is one that the user must change
|   +-- SplitError              a split does not place every layer exactly once
|   +-- AddressError            an address cannot be parsed, bound or resolved
|   +-- KeyMismatchError        a cluster key is missing or differs from the stage's
+-- CheckpointError             a checkpoint directory cannot be served as it is
|   +-- NotACheckpointError     there is no directory, no config.json or no weights
|   +-- UnsupportedModelError   a checkpoint is of a family that exo-kimi does not run
|   +-- ConfigError             config.json lacks a key, contradicts itself or asks for unknown maths
|   +-- UnsafeFormatError       the weights are in a format that runs code when it is read (pickle)
|   +-- TensorFileError         a weight file is truncated, its tensors overlap or its header is bad
|   +-- MissingTensorError      no file has a tensor that the architecture needs
|   +-- UnexpectedTensorError   no module consumes a tensor
|   +-- ShapeMismatchError      a tensor's shape fits no reading of the architecture
|   +-- DtypeError              a tensor is stored in a dtype that its role does not allow
|   +-- QuantizationError       packed shapes and config contradict each other beyond repair
|   +-- ForeignFormatError      the weights are in a known format that exo-kimi does not read
|   +-- NotFiniteError          a weight or a scale is NaN or infinite
|   +-- DamagedWeightsError     weights are zeros, copies, of no plausible size, or not the published file's
|   +-- CheckpointProblems      one pass has several findings: all of them, raised once
+-- PlanError                   a plan cannot be made, read or used
|   +-- PlanInfeasibleError     no split fits; says which machine is short and what would make it fit
|   +-- PlanMismatchError       a plan was made for another checkpoint
+-- ChatError                   text cannot become tokens, or a reply cannot be constrained
|   +-- TokenizerError          tokenizer files are missing or malformed
|   +-- TemplateError           a chat template cannot be rendered
+-- RequestError                a request is refused; carries `param` and `code` (HTTP 400)
|   +-- UnsupportedError        a request asks for a documented API feature that this server lacks
|   +-- ContextLengthError      a request has more tokens than the context or the KV memory can hold
|   +-- OverloadedError         the queue is full: try again later (HTTP 503)
+-- ExoError                    exo, as it runs on this network, cannot do what was asked
|   +-- ExoUnreachableError     nothing answers as exo at the address
|   +-- ExoVersionError         this exo's API is not one that exo-kimi was tested with
|   +-- ExoRefusedError         exo answered a request with an error
|   +-- ExoPlacementError       the exo cluster cannot take a plan as it is now
|   +-- ExoLoadError            an instance did not become ready; it was taken back
|       +-- ExoDeletedError     somebody deleted an instance before it had answered once
+-- FetchError                  files cannot be fetched from the hub or from another machine
|   +-- HubUnreachableError     nothing answers as the hub, or it is switched off
|   +-- NotHeldError            the other machine does not hold a part of the model that was asked of it
+-- PairingError                two machines cannot be paired
+-- MachineError                the machine has no memory, descriptor, process or room left for what a command needs
+-- RuntimeFault                the cluster of stages failed; the request did not (HTTP 503)
    +-- StageUnreachableError   a stage did not answer at its address
    +-- StageDiedError          a stage process ended
    +-- StageStalledError       a stage did not answer within the deadline
    +-- StageOutOfMemoryError   a stage ran out of memory
    +-- ExpertReadError         an expert could not be read from disk when a token needed it
    +-- StageError              a stage reported any other failure
    +-- ProtocolError           a frame has the wrong version, size or form
    +-- EngineStoppedError      the server is shutting down
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence


class ExoKimiError(Exception):
    """Base class of everything that exo-kimi raises on purpose: what went wrong, expected, found, where and the fix.

    Args:
        what: one line naming the thing that is wrong.
        expected: what should have been there.
        found: what was there.
        where: file, tensor, option or address.
        fix: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        details = (("expected", self.expected), ("found", self.found), ("where", self.where), ("fix", self.fix))
        lines = [self.what]
        lines += [f"  {label:<9} {value}" for label, value in details if value]
        return "\n".join(lines)


class UsageError(ExoKimiError):
    """Raised when the user must change an argument, an option or the environment."""


class SplitError(UsageError):
    """Raised when a split does not place every layer exactly once."""


class AddressError(UsageError):
    """Raised when an address cannot be parsed, bound or resolved."""


class KeyMismatchError(UsageError):
    """Raised when a cluster key is missing or differs from the stage's."""


class CheckpointError(ExoKimiError):
    """Raised when a checkpoint directory cannot be served as it is."""


class NotACheckpointError(CheckpointError):
    """Raised when there is no directory, no config.json or no weights."""


class UnsupportedModelError(CheckpointError):
    """Raised when a checkpoint is of a family that exo-kimi does not run."""


class ConfigError(CheckpointError):
    """Raised when config.json lacks a key, contradicts itself or asks for unknown maths."""


class UnsafeFormatError(CheckpointError):
    """Raised when the weights are in a format that runs code when it is read (pickle)."""


class TensorFileError(CheckpointError):
    """Raised when a weight file is truncated, its tensors overlap or its header cannot be read."""


class MissingTensorError(CheckpointError):
    """Raised when no file has a tensor that the architecture needs."""


class UnexpectedTensorError(CheckpointError):
    """Raised when no module consumes a tensor."""


class ShapeMismatchError(CheckpointError):
    """Raised when a tensor's shape fits no reading of the architecture."""


class DtypeError(CheckpointError):
    """Raised when a tensor is stored in a dtype that its role does not allow."""


class QuantizationError(CheckpointError):
    """Raised when packed shapes and config contradict each other beyond repair."""


class NotFiniteError(CheckpointError):
    """Raised when a weight or a scale is NaN or infinite."""


class ForeignFormatError(CheckpointError):
    """Raised when the weights are in a format that is known by name and that exo-kimi does not read."""


class DamagedWeightsError(CheckpointError):
    """Raised when weights are zeros, copies of others, of no plausible magnitude, or not those of the published file."""


class CheckpointProblems(CheckpointError):
    """Raised once for all findings of one pass over a checkpoint.

    Args:
        problems: the findings, in the order they were met; at least one.
        where: the checkpoint directory.
    """

    shown = 10

    def __init__(self, problems: Sequence[ExoKimiError], *, where: object) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'' if count == 1 else 's'} in the checkpoint", where=where)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        blocks = [f"{self.what}: {self.where}"]
        blocks += [f"{type(problem).__name__}: {problem}" for problem in self.problems[: self.shown]]
        if len(self.problems) > self.shown:
            blocks.append(f"... and {len(self.problems) - self.shown} more (exo-kimi inspect lists all of them)")
        return "\n".join(blocks)


class PlanError(ExoKimiError):
    """Raised when a plan cannot be made, read or used."""


class PlanInfeasibleError(PlanError):
    """Raised when no split fits the machines; says which one is short and what would make it fit.

    Args:
        short: bytes that are missing, by machine, in the split that misses the fewest.
        changes: the smallest changes that would make it fit, one sentence or block each.
    """

    def __init__(
        self,
        what: str,
        *,
        short: Mapping[str, int],
        changes: Sequence[str],
        where: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.short = dict(short)
        self.changes = tuple(changes)

    def __str__(self) -> str:
        if not self.changes:
            return super().__str__()
        return "\n".join([super().__str__(), "What would make it fit:", *(f"  - {change}" for change in self.changes)])


class PlanMismatchError(PlanError):
    """Raised when a plan was made for another checkpoint."""


class ChatError(ExoKimiError):
    """Raised when text, a template or a constraint on a reply fails."""


class TokenizerError(ChatError):
    """Raised when tokenizer files are missing or malformed."""


class TemplateError(ChatError):
    """Raised when a chat template cannot be rendered."""


class RequestError(ExoKimiError):
    """Raised when a request is refused.

    Args:
        param: the request field at fault, as the client wrote it.
        code: OpenAI's short machine-readable code.
    """

    def __init__(
        self,
        what: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        expected: object = None,
        found: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, where=where, fix=fix)
        self.param = param
        self.code = code


class UnsupportedError(RequestError):
    """Raised when a request asks for a documented API feature that this server lacks."""


class ContextLengthError(RequestError):
    """Raised when a request has more tokens than the context or the KV memory can ever hold."""


class OverloadedError(RequestError):
    """Raised when the queue is full; the same request may be accepted later."""


class ExoError(ExoKimiError):
    """Raised when exo, as it runs on this network, cannot do what was asked."""


class ExoUnreachableError(ExoError):
    """Raised when nothing answers as exo at the address."""


class ExoVersionError(ExoError):
    """Raised when this exo's API is not one that exo-kimi was tested with."""


class ExoRefusedError(ExoError):
    """Raised when exo answered a request with an error."""


class ExoPlacementError(ExoError):
    """Raised when the exo cluster cannot take a plan as it is now."""


class ExoLoadError(ExoError):
    """Raised when an instance did not become ready; it was taken back."""


class ExoDeletedError(ExoLoadError):
    """Raised when somebody deleted an instance before it had answered once."""


class FetchError(ExoKimiError):
    """Raised when files cannot be fetched from the hub or from another machine."""


class HubUnreachableError(FetchError):
    """Raised when nothing answers as the hub, or when it is switched off by HF_HUB_OFFLINE."""


class NotHeldError(FetchError):
    """Raised when the other machine does not hold a part of the model that was asked of it."""


class PairingError(ExoKimiError):
    """Raised when two machines cannot be paired: another code, too many tries, or nobody there."""


class MachineError(ExoKimiError):
    """Raised when the machine has no memory, descriptor, process or room left for what a command needs."""


_MACHINE_FIXES = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close other programs: all of the system's files are open",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`), or close other programs",
    errno.ENOMEM: "close other programs",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
}


def machine_error(error: BaseException) -> MachineError | None:
    """A failure that is neither ours nor the user's, but the machine's, in one line with the fix; None for any other."""
    number = getattr(error, "errno", None)  # zmq's errors have one and are no OSError
    # CPython 3.11 and 3.12 have no better word for a call whose frame had no memory.
    frameless = isinstance(error, SystemError) and "without exception set" in str(error)
    # Where MLX on a CPU has no memory for an array, it hands out an address of nothing, at which the kernel cannot write.
    nowhere = isinstance(error, OSError) and number == errno.EFAULT
    if frameless or nowhere or isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and "start new thread" in str(error):  # Python has no class for it
        number = errno.EAGAIN
    if number not in _MACHINE_FIXES:
        return None
    said = "" if frameless or nowhere else getattr(error, "strerror", None) or str(error)
    what = said or "no memory is left"
    return MachineError(what, where=getattr(error, "filename", None), fix=_MACHINE_FIXES[number])


class RuntimeFault(ExoKimiError):
    """Raised when the cluster of stages failed; the request itself was fine.

    Args:
        stage: index of the stage at fault, when it is known.
    """

    def __init__(
        self,
        what: str,
        *,
        stage: int | None = None,
        expected: object = None,
        found: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, found=found, where=where, fix=fix)
        self.stage = stage


class StageUnreachableError(RuntimeFault):
    """Raised when a stage did not answer at its address."""


class StageDiedError(RuntimeFault):
    """Raised when a stage process ended."""


class StageStalledError(RuntimeFault):
    """Raised when a stage did not answer within the deadline."""


class StageOutOfMemoryError(RuntimeFault):
    """Raised when a stage ran out of memory."""


class ExpertReadError(RuntimeFault):
    """Raised when an expert could not be read from disk when a token needed it."""


class StageError(RuntimeFault):
    """Raised when a stage reported a failure that has no class of its own."""


class ProtocolError(RuntimeFault):
    """Raised when a frame has the wrong version, size or form."""


class EngineStoppedError(RuntimeFault):
    """Raised when the server is shutting down."""
