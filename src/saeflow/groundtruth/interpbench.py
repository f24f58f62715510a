"""Opens the published folders of InterpBench (huggingface.co/cybershiptrooper/InterpBench) without running a pickle.

`ll_model_cfg.pkl` holds a dict of numbers, texts and a few torch types. It is read opcode by opcode: what builds plain
data is carried out, a name is accepted if it is that of a torch dtype or of `torch.device`, and anything else, above
all a call of anything else, is refused before anything is imported. `ll_model.pth` is opened by torch's own reader of
weights.
"""

import pickletools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeflow.config import ConfigError
from saeflow.config.checks import where
from saeflow.groundtruth.compiler import empty_weights
from saeflow.planning.digests import DigestCache, short_hash

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "ll_model_cfg.pkl", "ll_model.pth"
ACTIVATIONS = ("relu", "gelu")  # of `saeflow.groundtruth.network`, which a plan does not import
MOST_BYTES = 1 << 20  # of a config: the published ones have two thousand
MOST_SHARED = 16  # containers that stand in several places: sixty of them, each twice in the next, fill any memory
_FIELDS = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab", "d_vocab_out", "act_fn",
           "normalization_type", "positional_embedding_type", "attention_dir")  # fmt: skip


class InterpBenchError(ConfigError):
    """A folder that is not one of InterpBench's, or not safe; the message names the file."""


class Published(NamedTuple):
    config: dict[str, Any]
    """Those fields of `HookedTransformerConfig` that say what is computed."""
    weights: "dict[str, Tensor]"
    """float32, by TransformerLens's names."""


def published_digest(folder: Path, digests: DigestCache) -> str:
    """Hash of the two files of a model of InterpBench, 32 hexadecimal digits."""
    return short_hash([digests.file(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)], 32)


def read_interpbench(folder: str | Path) -> Published:
    """Reads `ll_model_cfg.pkl` and `ll_model.pth`. Raises `InterpBenchError` for files that hold anything but a config
    and weights, or a model with norms or other parts that the cases' models do not have."""
    config = read_config(Path(folder))
    return Published(config, _weights(Path(folder) / WEIGHTS_FILE, config))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model of InterpBench, without its weights. Raises `InterpBenchError` as `read_interpbench`."""
    if not folder.is_dir():
        raise InterpBenchError(f"model.tracr.path={folder}: no such folder{where(folder)}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InterpBenchError(f"{folder} has no {name}: it is no folder of a model of InterpBench")
    content = plain_pickle(folder / CONFIG_FILE)
    if not isinstance(content, dict):
        raise InterpBenchError(
            f"{folder / CONFIG_FILE} holds a {type(content).__name__}, not a dict of a model's sizes"
        )
    lacking = [name for name in _FIELDS if name not in content]
    if lacking:
        raise InterpBenchError(f"{folder / CONFIG_FILE} lacks {', '.join(lacking)}")
    config = {name: content[name] for name in _FIELDS}
    legal = {
        "act_fn": ACTIVATIONS,
        "normalization_type": (None,),
        "positional_embedding_type": ("standard",),
        "attention_dir": ("causal", "bidirectional"),
    }
    for name, values in legal.items():
        if config[name] not in values:
            legal_values = " or ".join(map(str, values))
            raise InterpBenchError(
                f"{folder / CONFIG_FILE}: {name} is {config[name]!r}; a case's model has {legal_values}"
            )
    return config


def _weights(file: Path, config: dict[str, Any]) -> "dict[str, Tensor]":
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251 -- tensors only, no code
    except Exception as error:  # torch raises UnpicklingError, which only the banned module names, and others
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InterpBenchError(f"{file} is not a file of weights alone, and is not opened: {reason}") from error
    wanted = empty_weights(config)
    for name, zeros in wanted.items():
        shape = tuple(state[name].shape) if isinstance(state, dict) and name in state else None
        if shape != zeros.shape:
            raise InterpBenchError(f"{file}: {name} has shape {shape}, but its config says {zeros.shape}")
    return {name: state[name].float() for name in wanted}


_DTYPES = {"float16", "float32", "float64", "bfloat16"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
           "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    module: str
    name: str


def plain_pickle(file: Path) -> Any:
    """The plain data of a pickle: dicts, lists, tuples, sets, numbers, texts; a torch dtype or device by its name.

    Raises `InterpBenchError` for anything else in it.
    """
    content = file.read_bytes()
    if len(content) > MOST_BYTES:
        raise InterpBenchError(f"{file} has {len(content):,} bytes: too many for the config of a model")
    try:
        return _Reader(file).read(content)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        # a stack that is empty, an unhashable key, a list in itself, ...
        if isinstance(error, InterpBenchError):
            raise
        raise InterpBenchError(f"{file} is damaged, or no pickle: {error}") from error


class _Reader:
    """A pickle machine that knows only how to build data."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.shared = 0

    def read(self, content: bytes) -> Any:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name == "STOP":
                return self._value(self.stack.pop())
            self._do(opcode.name, argument, position)
        raise InterpBenchError(f"{self.file} ends too early")

    def _do(self, name: str, argument: Any, position: int | None) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            n = _TUPLES[name]
            stack[len(stack) - n :] = [tuple(stack[len(stack) - n :])]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._above_mark()))
        elif name == "LIST":
            stack.append(self._above_mark())
        elif name == "DICT":
            stack.append(_as_dict(self._above_mark()))
        elif name in ("APPEND", "APPENDS"):
            added = self._above_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(added)
        elif name in ("SETITEM", "SETITEMS"):
            added = self._above_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].update(_as_dict(added))
        elif name == "ADDITEMS":
            added = self._above_mark()
            stack[-1].update(added)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
            self.shared += isinstance(stack[-1], dict | list | tuple | set)
            if self.shared > MOST_SHARED:
                raise InterpBenchError(f"{self.file} is refused: it repeats its parts in one another, without bound")
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Name(*stack[-2:])]
        elif name == "REDUCE" and stack[-2] == _Name("torch", "device"):
            stack[-2:] = [":".join(str(part) for part in stack[-1])]
        else:
            called = f" of {'.'.join(stack[-2])}" if name == "REDUCE" and isinstance(stack[-2], _Name) else ""
            raise InterpBenchError(
                f"{self.file} is refused: at byte {position} it holds {name}{called}, which is no data and could run "
                "code. InterpBench's own files hold a dict of numbers and texts: fetch the folder again from there"
            )

    def _above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def _value(self, value: Any) -> Any:
        """With names of torch dtypes as texts; any other name is refused."""
        if isinstance(value, _Name):
            if value.module == "torch" and value.name in _DTYPES:
                return f"torch.{value.name}"
            raise InterpBenchError(
                f"{self.file} is refused: it names {'.'.join(map(str, value))}, which is neither data nor a torch dtype"
            )
        if isinstance(value, dict):
            return {self._value(k): self._value(v) for k, v in value.items()}
        if isinstance(value, list | tuple | set):
            return type(value)(self._value(v) for v in value)
        return value


def _as_dict(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
