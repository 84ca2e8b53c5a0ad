"""The stored tensors of a quantized weight as members of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit import backends, ops
from lowbit.backends import PreparedWeight
from lowbit.memory import drop_mapped_pages
from lowbit.quant import QuantizedWeight
from lowbit.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.nn.siblings import Siblings

_KERNEL = "kernel_"
_left_out: ContextVar[bool] = ContextVar("lowbit_left_out", default=False)


@contextmanager
def base_left_out() -> Iterator[None]:
    """Leaves quantized linear layers out of state dicts made inside, for saving adapters alone.

    Making the canonical tensors of a prepared model takes minutes, and an adapter's file holds none
    of them.
    """
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


class StoredWeight(nn.Module):
    """Mixin: holds one quantized weight instead of a parameter `weight`.

    It holds either the canonical tensors (those of a checkpoint) or a prepared weight, which is the
    same in the order that the kernels of one backend read. A state dict is canonical either way.

    Of the canonical tensors, integers are parameters (accelerate offloads parameters, not buffers).
    Float tensors are buffers, because transformers takes the dtype of the first float *parameter*
    for the dtype of the model: with fp16 scales among the parameters, a bf16 model whose embedding
    is quantized would call itself fp16, and be saved and reloaded as such.

    The tensors of a prepared weight are buffers named `kernel_<name>`, and not persistent: whatever
    moves or counts a model's tensors sees them, whatever saves or offloads it does not.

    Attributes:
        scheme: how the weight is stored.
        logical_shape: (out_features, in_features).
        compute_dtype: dtype of `weight` and of `dequantize()`; `.to(dtype)` changes this only.
        plain_class: the class that this module replaces, to go back to.
        multiplies: whether activations are multiplied by the weight; else there is nothing to gain
            from preparing it.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    scheme: Scheme
    logical_shape: tuple[int, int]
    compute_dtype: torch.dtype
    plain_class: type[nn.Module]
    multiplies: bool = True
    # Over the tensors in `_buffers`; the dictionary is what `tensors()` returned for it.
    _prepared: PreparedWeight | None = None
    _prepared_tensors: Mapping[str, Tensor]
    # Whether to prepare it again once there is something to prepare: after `to_empty`, say.
    _wants_preparing: bool = False
    # Layers that see the same activations, and its place among them; see `nn/siblings.py`.
    _siblings: tuple[Siblings, int] | None = None
    # What activations are rounded to while multiplying, see `backends.prepare`; never stored.
    _activations: str = "float"

    def _create_stored(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        """Registers uninitialised tensors for a weight `[out, in]`."""
        self.scheme, self.logical_shape, self.compute_dtype = scheme, shape, compute_dtype
        self._register_stored(_empty_stored(scheme, shape, device))
        # transformers must not initialise what it takes for an nn.Linear or nn.Embedding.
        self._is_hf_initialized = True

    def _fill_stored(self, qweight: QuantizedWeight) -> None:
        """Puts the tensors of `qweight` in place, without copying them."""
        self._register_stored(qweight.tensors())

    def _register_stored(self, tensors: Mapping[str, Tensor]) -> None:
        others = {name: p for name, p in self._parameters.items() if name not in tensors}
        # A bias comes after them, whatever was registered first: files have that order.
        self._parameters.clear()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._parameters.update(others)

    @property
    def operand(self) -> QuantizedWeight | PreparedWeight:
        """The weight as it is held, for the functions of `ops`."""
        prepared = self._prepared
        if prepared is None:
            return self._canonical()
        if torch.compiler.is_compiling():
            # Read as buffers, so that CUDA graphs know that they stay where they are.
            return prepared.with_tensors(self._kernel_tensors())
        for name, tensor in self._prepared_tensors.items():
            if self._buffers[_KERNEL + name] is not tensor:
                return self._prepared_again()
        return prepared

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The canonical tensors with their meaning; made anew where the weight is prepared."""
        held = self.operand
        return held.canonical() if isinstance(held, PreparedWeight) else held

    def _canonical(self) -> QuantizedWeight:
        return QuantizedWeight(
            scheme=self.scheme,
            in_features=self.logical_shape[1],
            packed=self.weight_packed,
            scale=self.weight_scale,
            zero_point=getattr(self, "weight_zero_point", None),
            scale_offset=getattr(self, "weight_scale_offset", None),
            scale_step=getattr(self, "weight_scale_step", None),
            input_scale=getattr(self, "input_scale", None),
        )

    @property
    def qweight(self) -> Tensor:
        """The codes as they are held, by the name that PEFT looks for."""
        if self._prepared is None:
            return self.weight_packed
        return next(iter(self._kernel_tensors().values()))

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - PEFT's name
        """The codes: PEFT calls `dequantize()` on modules that have a `W_q`."""
        return self.qweight

    @property
    def weight(self) -> Tensor:
        """The decoded weight, made anew on every access; the 16-bit placeholder while loading.

        Model code reads its dtype, and GPT-2's initialisation writes to the weights of children:
        the flag makes that a no-op.
        """
        placeholder = self._parameters.get("weight")
        if placeholder is not None:
            return placeholder
        decoded = self.dequantize()
        decoded._is_hf_initialized = True  # type: ignore[attr-defined]
        return decoded

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight `[out_features, in_features]` in `dtype` (default: compute_dtype)."""
        return ops.dequantize(self.operand, dtype or self.compute_dtype)

    def prepare(self) -> bool:
        """Rearranges the weight for the backend that multiplies by it; True if it now is.

        Left canonical: what no activations are multiplied by, what is offloaded or still loading,
        and weights of backends that read the canonical tensors.
        """
        self._wants_preparing = True
        if self._prepared is None and self.multiplies and not self._is_elsewhere():
            # Not in inference mode, whose tensors no later training could use.
            with torch.inference_mode(False), torch.no_grad():
                prepared = backends.prepare(
                    self._canonical(), self.compute_dtype, self._activations
                )
            if prepared is not None:
                for name in self._names():
                    for held in (self._parameters, self._buffers):
                        tensor = held.pop(name, None)
                        if tensor is not None:
                            drop_mapped_pages(tensor)
                self._hold(prepared.for_mode(self.training))
        self._join_siblings()
        return self._prepared is not None

    def round_activations(self, activations: str) -> None:
        """Multiplies from now on by "float" or by "int8" activations; nothing of it is stored.

        Raises:
            LowbitError: where no backend does that here.
        """
        if self._prepared is not None:
            held = self.operand
            assert isinstance(held, PreparedWeight)
            self._replace_prepared(held.with_activations(activations))
        self._activations = activations

    def restore(self) -> None:
        """Goes back to the canonical tensors, those that were prepared bit for bit."""
        self._wants_preparing = False
        if self._prepared is None:
            return
        device = self.qweight.device
        with torch.inference_mode(False), torch.no_grad():
            tensors = self.quantized_weight.tensors()
        self._drop()
        self._register_stored({name: tensor.to(device) for name, tensor in tensors.items()})

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, and gives a prepared weight the form for it."""
        super().train(mode)
        held = self.operand if self._prepared is not None else None
        if isinstance(held, PreparedWeight):
            with torch.inference_mode(False), torch.no_grad():
                changed = held.for_mode(mode)
            if changed is not held:
                self._replace_prepared(changed)
        self._join_siblings()
        return self

    def _is_elsewhere(self) -> bool:
        """Returns True while tensors of the weight are on meta, or a 16-bit weight is awaited."""
        held = [self._parameters.get(name, self._buffers.get(name)) for name in self._names()]
        missing = any(tensor is None or tensor.is_meta for tensor in held)
        return missing or self._parameters.get("weight") is not None

    def _hold(self, prepared: PreparedWeight) -> None:
        """Takes the tensors of `prepared` as its own."""
        self._prepared, self._prepared_tensors = prepared, prepared.tensors()
        for name, tensor in self._prepared_tensors.items():
            self.register_buffer(_KERNEL + name, tensor, persistent=False)

    def _drop(self) -> None:
        """Forgets the prepared weight."""
        if self._siblings is not None:
            self._siblings[0].part()
        for name in self._prepared_tensors:
            delattr(self, _KERNEL + name)
        self._prepared, self._prepared_tensors = None, {}

    def _replace_prepared(self, prepared: PreparedWeight) -> None:
        self._drop()
        self._hold(prepared)

    def _join_siblings(self) -> None:
        if self._siblings is not None:
            self._siblings[0].join()

    def _tensors_are_its_own(self, operand: QuantizedWeight | PreparedWeight) -> bool:
        """Returns True if the tensors of `operand` were prepared, not put there by others."""
        if not torch.compiler.is_compiling():
            return operand is self._prepared
        return self._prepared is not None and all(
            self._buffers[_KERNEL + name] is tensor
            for name, tensor in self._prepared_tensors.items()
        )

    def _kernel_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, _KERNEL + name) for name in self._prepared_tensors}

    def _prepared_again(self) -> QuantizedWeight | PreparedWeight:
        """Returns the operand where others replaced buffers (accelerate, functional_call)."""
        assert self._prepared is not None
        tensors = self._kernel_tensors()
        before = next(iter(self._prepared_tensors.values())).device
        changed = self._prepared.with_tensors(tensors)
        if next(iter(tensors.values())).device.type == before.type:
            return changed
        self._replace_prepared(changed)
        self._follow_backend()
        return self.operand

    def _follow_backend(self) -> None:
        """Prepares the weight for the backend that now runs it, away from the one that did."""
        if self._prepared is not None:
            request = backends.Request(
                self.scheme,
                self.qweight.device,
                self.compute_dtype,
                *self.logical_shape,
                prepared=True,
            )
            if backends.select(request).name != self._prepared.backend:
                self.restore()
        self.prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves everything, casts everything except the stored tensors.

        `.half()` and `.to(dtype)` must not round scales: codes were chosen for exactly these.
        Kernels differ by the type of device, so a weight goes to another type in canonical form,
        one module after the other, and is prepared there if the backend there wants it.
        """
        if not self._names():
            return self._apply_here(fn, recurse)
        device = self.qweight.device
        target = fn(torch.empty(0, dtype=torch.int32, device=device)).device
        if self._prepared is not None and target.type != device.type:
            if target.type == "meta":
                self._drop()
                self._register_stored(_empty_stored(self.scheme, self.logical_shape, "meta"))
            else:
                self.restore()
        dtype = self.compute_dtype
        self._apply_here(fn, recurse)
        if self._prepared is not None:
            tensors = self._kernel_tensors()
            if any(tensors[name] is not old for name, old in self._prepared_tensors.items()):
                self._replace_prepared(self._prepared.with_tensors(tensors))
                self._join_siblings()
        if (target.type, self.compute_dtype) != (device.type, dtype):
            self._follow_backend()
        return self

    def _apply_here(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        """Applies `fn` to every tensor, keeping the dtype of stored ones."""
        names = [*self._names(), *(n for n in self._buffers if n.startswith(_KERNEL))]
        stored = {id(self._parameters.get(name, self._buffers.get(name))) for name in names}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Writes the canonical tensors, in their usual order.

        Those of a prepared weight are made for the occasion. They go to the CPU: on the device,
        saving a model would need room for it a second time.
        """
        if _left_out.get() and isinstance(self, nn.Linear):
            return
        if self._prepared is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        with torch.no_grad():
            tensors = {name: t.cpu() for name, t in self.quantized_weight.tensors().items()}
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        for name, tensor in tensors.items():
            if name not in floats:
                destination[prefix + name] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in floats.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Reads canonical tensors, and prepares them if the weight was prepared."""
        wanted = self._wants_preparing
        if any(prefix + name in state_dict for name in self._names()):
            self.restore()
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if wanted:
            self.prepare()

    def _names(self) -> tuple[str, ...]:
        return tuple(self.scheme.tensor_specs(self.logical_shape))


def _empty_stored(
    scheme: Scheme, shape: tuple[int, int], device: torch.device | str | None
) -> dict[str, Tensor]:
    """Returns name -> uninitialised tensor of everything that is stored."""
    return {
        name: torch.empty(size, dtype=dtype, device=device)
        for name, (size, dtype) in scheme.tensor_specs(shape).items()
    }
