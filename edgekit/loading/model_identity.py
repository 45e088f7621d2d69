"""Identity of a model: what tells it from another, and whether it gives the same twice."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.loading import pruned_mark

if TYPE_CHECKING:
    from edgekit.loading.model import Model


def no_state(original: Model, what: str) -> EdgeKitError:
    """Returns the error for a model whose state `what` does not know how to carry from sample to sample."""
    names = ", ".join(state.input.name for state in original.state)
    return EdgeKitError(
        f"{what} take samples in any order, and {original.name} has state from call to call ({names})",
        "leave them out; --precision int8 calibrates along the stream of samples",
    )


def identity(original: Model, model: Any) -> dict[str, str | None]:
    """Returns what tells one model from another: hashes of where it came from, of its weights and of its structure.

    `model` is what the user gave. The source is None for a module object.
    """
    import hashlib

    from edgekit.util.user_code import is_code

    def hashed(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    source = None
    if isinstance(model, str | Path):
        head, colon, name = str(model).rpartition(":") if is_code(str(model)) else (str(model), "", "")
        source = hashed(str(Path(head or name).resolve()), colon and name)
    shapes = [tuple(parameter.shape) for parameter in original.module.parameters()]
    structure = hashed(shapes, original.inputs, original.outputs)
    if original.onnx is not None:
        weights = hashlib.sha256(original.onnx.SerializeToString()).hexdigest()[:32]
        return {"source": source, "weights": weights, "structure": weights}
    content = pruned_mark.fingerprint(original.module) if shapes else structure
    return {"source": source, "weights": content, "structure": structure}


def check_repeatable(original: Model) -> None:
    """Raises EdgeKitError for a model whose outputs differ from run to run: no file can be compared with them."""
    if original.random is not None:
        raise EdgeKitError(
            f"{original.random}: it gives other outputs at every run, and no file can be compared with them",
            "return what is not random (of a VAE the mean), take the noise as an input, or draw it in training alone: "
            "F.dropout(x, training=self.training)",
        )
