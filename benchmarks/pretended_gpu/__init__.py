"""A GPU that is not there: shapes, launches, bytes and waits of a program that runs as on one, without memory or time.

Tensors are PyTorch's fake ones, on a CUDA device that need not exist: code that asks for `device.type` or `is_cuda`
goes the way it goes on a GPU. Small integers and masks have their values beside them, so that whoever looks at one on
the host (and would wait for the GPU) gets the true answer, and the look is counted, with the line that looked. Logits
count as zeros.

Every operator that is no view counts as one launch and moves what it reads and writes once. Attention is one launch
where CUDA's fused kernels take it, else what PyTorch's own formula launches; `rms_norm` is one. CUDA graphs are
recorded and played by name alone. What it cannot tell: how long anything takes.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pretended_gpu import fused

CUDA = torch.device("cuda:0")
SMALL = 2**22
"""Elements of the largest tensor whose values are kept."""
FREE = {
    "_unsafe_view",
    "detach_",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "device",
    "set_",
}
LAUNCHES = {"roll": 2, "constant_pad_nd": 2}
"""Of operators that are several kernels: rolling goes by axes, padding fills and copies."""
LOOKUPS = {"embedding", "index", "index_select", "gather"}
"""They read as much of a table as they return."""
OVERWRITES = {"copy_", "fill_", "zero_", "index_put_", "_index_put_impl_", "slice_scatter", "scatter_"}
"""They write their first argument (or a part as large as the last one) without reading it."""
CHANCE = {"rand", "randn", "rand_like", "randn_like", "normal_", "uniform_", "set_"}
BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "repeat_interleave", "equal"}
"""Their result, or its shape, depends on values."""
WAITING = {"nonzero", "masked_select", "_unique2", "equal", "bincount"}


class PretendedGpu(TorchDispatchMode):
    """Counts what code inside `with` would launch, move and wait for.

    Args:
        vocab_size: width of logits, which count as zeros.

    Attributes:
        launches: number of kernels, by operator.
        moved_bytes: bytes that they read and write.
        waits: number of waits of the host for the device, by kind and line of code.
        fused, unfused: number of attentions, by the kernel they get.
        recorded, replayed: number of CUDA graphs.
    """

    _fake = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: constants that modules keep are of it
    _values = WeakTensorKeyDictionary()

    def __init__(self, vocab_size: int = -1) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._pinned = WeakTensorKeyDictionary()
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.moved_bytes = self.fused = self.unfused = self.recorded = self.replayed = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Pretend within."""
        with self._fake, self, _Calls(self), fused.graphs(self):
            yield self

    def place(self, model: nn.Module) -> None:
        """Move a model of the meta device to the pretended one."""
        with self._fake:
            for module in model.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in list(table.items()):
                        if tensor is not None and tensor.device.type == "meta":
                            fake = FakeTensor(self._fake, tensor.detach(), CUDA)
                            is_weight = isinstance(tensor, nn.Parameter)
                            table[name] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake  # type: ignore[assignment]

    # --- Counting ----------------------------------------------------------------------------------------------------

    def launch(self, name: str, num_bytes: int, num: int = 1) -> None:
        """Count a kernel."""
        self.launches[name] += num
        self.moved_bytes += num_bytes * num

    def wait(self, kind: str) -> None:
        """Count a wait of the host, and who waits."""
        self.waits[f"{kind} at {_caller()}"] += 1

    def listed(self, tensor: Tensor) -> Any:
        """A tensor as nested lists."""
        if _is_on_gpu(tensor):
            self.wait("tolist")
        with _plainly():
            value = self.value(tensor)
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy().tolist()

    def value(self, tensor: Tensor) -> Tensor:
        """What a tensor holds; zeros where that is not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        with _plainly():
            return self._values[tensor] if tensor in self._values else torch.zeros(tensor.shape, dtype=tensor.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            if _is_on_gpu(args[0]):
                self.wait("item")
            with _plainly():
                return self.value(args[0]).item()
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such operators come whole
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        pinned = bool(kwargs.get("pin_memory")) and kwargs.get("device") in (None, torch.device("cpu"))
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        self._note_waits(func, name, args, kwargs)
        real = self._real_result(func, name, args, kwargs)
        args = self._without_masks(name, args)
        out = self._shaped_by(real, args) if name in BY_VALUES and real is not None else func(*args, **kwargs)
        outs = [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]
        self._keep(func, args, outs, real)
        for made in outs if pinned else []:
            self._pinned[made] = True
        if not func.is_view and name not in FREE and any(map(_is_on_gpu, [*_tensors(args), *outs])):
            self.launch(name, _num_bytes(name, args, outs), LAUNCHES.get(name, 1))
        return out

    # --- Waits -------------------------------------------------------------------------------------------------------

    def _note_waits(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Count an operator for which the host waits."""
        tensors = _tensors(args)
        if not any(map(_is_on_gpu, tensors)) and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) == 1):
            self.wait(name)
        elif name in ("_to_copy", "copy_"):
            source = args[-1] if name == "_to_copy" else args[1]
            target = torch.device(kwargs.get("device") or source.device) if name == "_to_copy" else args[0].device
            quick = bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            to_host = _is_on_gpu(source) and target.type == "cpu"
            to_gpu = not _is_on_gpu(source) and target.type == "cuda" and (source.dim() or name == "_to_copy")
            if to_host and not (quick and name == "copy_" and args[0] in self._pinned):
                self.wait("copy to the host")
            elif to_gpu and not (quick and source in self._pinned):
                self.wait("pageable copy")
        elif name.startswith(("index", "_index_put")):
            for index in _tensors(args[1]) if isinstance(args[1], (list, tuple)) else []:
                if not _is_on_gpu(index) and index.dim():
                    self.wait("pageable copy")
                elif index.dtype in (torch.bool, torch.uint8):
                    if name == "index":
                        self.wait("boolean indexing")
                    elif args[2].numel() > 1:
                        self.wait("masked assignment")

    def _shaped_by(self, real: Any, args: Any) -> Any:
        """Results of the shapes that values gave, where the arguments are."""
        device = CUDA if any(map(_is_on_gpu, _tensors(args))) else torch.device("cpu")
        if isinstance(real, bool):
            return real
        if isinstance(real, Tensor):
            return torch.empty(real.shape, dtype=real.dtype, device=device)
        return type(real)(self._shaped_by(part, args) for part in real)

    def _without_masks(self, name: str, args: Any) -> Any:
        """Indices in place of boolean masks, whose result has a shape that only values tell."""
        if not name.startswith(("index", "_index_put")) or len(args) < 2 or not isinstance(args[1], (list, tuple)):
            return args
        if not any(t.dtype == torch.bool for t in _tensors(args[1])):
            return args
        places: list[Any] = []
        for index in args[1]:
            if index is None or index.dtype != torch.bool:
                places.append(index)
                continue
            with _plainly():
                found = self.value(index).nonzero(as_tuple=True)
            for place in found:
                fake = self._fake.from_tensor(place) if not isinstance(place, FakeTensor) else place
                places.append(torch.empty_like(fake, device=index.device))
                self._values[places[-1]] = place
        return (args[0], places, *args[2:])

    # --- Values ------------------------------------------------------------------------------------------------------

    def _real_result(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What a small operator gives, if what it takes is known; else none."""
        tensors = _tensors(args)
        if any(isinstance(t, FakeTensor) and t not in self._values for t in tensors):
            return None
        if any(t.numel() > SMALL for t in tensors) or "empty" in name or name in CHANCE:
            return None
        if not tensors:  # factories of numbers that attention or sums start from are never looked at
            sizes = args[0] if args and isinstance(args[0], (list, tuple)) else []
            if torch.Size(sizes).numel() > (SMALL if kwargs.get("dtype") in (torch.int64, torch.bool) else 4096):
                return None
        moved = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        with _plainly():
            try:
                return func(*_swap(args, self._values), **moved)
            except (RuntimeError, NotImplementedError, IndexError):
                return None

    def _keep(self, func: Any, args: Any, outs: list[Tensor], real: Any) -> None:
        """Remember the values of results."""
        reals = [t for t in (real if isinstance(real, (list, tuple)) else [real]) if isinstance(t, Tensor)]
        if reals and len(reals) == len(outs):
            for out, value in zip(outs, reals, strict=True):
                if isinstance(out, FakeTensor) and out.shape == value.shape:
                    self._values[out] = value
            return
        for out in outs:
            if out in self._values and any(out is t for t in _tensors(args)):  # written with what is not known
                del self._values[out]
            if out.dim() and out.shape[-1] == self._vocab_size and out.numel() <= SMALL and out.is_floating_point():
                with _plainly():
                    self._values[out] = torch.zeros(out.shape, dtype=out.dtype)


class _Calls(TorchFunctionMode):
    """Calls that operators do not show: arrays of tensors, pinned memory, attention."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, gpu = kwargs or {}, getattr(func, "__name__", ""), self._gpu
        if name == "numpy" and isinstance(args[0], FakeTensor):
            with _plainly():
                return gpu.value(args[0]).numpy()
        if name == "pin_memory":
            gpu._pinned[args[0]] = True
            return args[0]
        if name == "is_pinned":
            return args[0] in gpu._pinned
        if name == "scaled_dot_product_attention" and _is_on_gpu(args[0]):
            return fused.attend(gpu, *args, **kwargs)
        if name == "rms_norm" and _is_on_gpu(args[0]):
            return fused.rms_norm(gpu, *args, **kwargs)
        return func(*args, **kwargs)


# --- Small helpers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Without any mode: on the real CPU."""
    from torch._C import DisableTorchFunction
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


def _is_on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _tensors(values: Any) -> list[Tensor]:
    """All tensors of nested arguments."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _swap(values: Any, by: Any) -> Any:
    """Nested arguments with known values in place of tensors."""
    if isinstance(values, Tensor):
        return by[values] if isinstance(values, FakeTensor) else values
    if isinstance(values, torch.device):
        return torch.device("cpu")
    return type(values)(_swap(value, by) for value in values) if isinstance(values, (list, tuple)) else values


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: what is expanded is read once."""
    num = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        num *= size if stride or size == 0 else 1
    return num * tensor.element_size()


def _num_bytes(name: str, args: Any, outs: list[Tensor]) -> int:
    inputs, written = _tensors(args), sum(map(tensor_bytes, outs))
    if name in LOOKUPS:
        return 2 * written + sum(tensor_bytes(t) for t in inputs[1:])
    if name in ("index_put_", "_index_put_impl_", "index_put"):
        return sum(tensor_bytes(t) for t in inputs[1:]) + tensor_bytes(inputs[-1])
    if name in OVERWRITES:
        return written + sum(tensor_bytes(t) for t in inputs[1:])
    return written + sum(map(tensor_bytes, inputs))


_OURS = ("/af2_ray/", "/transformers/")


def _caller() -> str:
    """File and line of the innermost frame of the project or of transformers."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in _OURS):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "elsewhere"


def backward(loss: Tensor, gpu: PretendedGpu) -> None:
    """Run a backward pass, node by node: PyTorch's engine asks for a real device.

    Gradients of weights are made and dropped.
    """
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(before, False) for before, _ in node.next_functions if before is not None and before not in seen]
    grads: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad():
        for node in reversed(order):
            given = grads.pop(node, {})
            if not given or type(node).__name__ == "AccumulateGrad":
                continue
            num = max(max(given) + 1, len(getattr(node, "_input_metadata", ())))
            call = getattr(node, "apply", node)  # of an operator written in Python
            made = call(*(given.get(place) for place in range(num)))
            for (before, place), grad in zip(node.next_functions, made if isinstance(made, tuple) else (made,)):
                if before is not None and grad is not None:
                    table = grads.setdefault(before, {})
                    table[place] = table[place] + grad if place in table else grad
