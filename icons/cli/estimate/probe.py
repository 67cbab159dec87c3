"""What a pass over a batch takes, counted by running it on tensors that have shapes and no contents.

The operations are torch's own count (`FlopCounterMode`); the memory is the bytes alive at once, storage by storage.
What is run is what the command runs: the backward pass of `icons.gradients`, or a training step under autocast.
"""

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from icons.cli.estimate.workload import Workload
from icons.gradients.backward_pass import BackwardPass
from icons.gradients.paths import paths_of
from icons.gradients.structure import members_of
from icons.models.loading import checkpoint_layers

Kind = Literal["per-sample", "training", "forward"]
FEW, _MORE = 2, 3
"""Layers that are run; each of the others is taken to add what the third adds."""
# torch counts the attention kernels of GPUs alone; the arguments are shapes
ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, query, key, value, *_, **__: (
        sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


def operations(model: nn.Module, kind: Kind, length: int, load: Workload) -> float:
    """Floating-point operations of a pass of the language model over one row, half of its tokens supervised.

    Args:
        model: Hugging Face causal or image-text model, with LoRA or without, on the meta device; stays as it is.
        kind: per-sample gradients; a training step; or a forward pass alone.
        length: of the row, in tokens.
        load: attention and checkpointing.
    """

    def count(part: _LanguagePart) -> float:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            run(part, kind, 1, length, load)
        return float(counter.get_total_flops())

    return _over_layers(model, count)


def peak_memory(model: nn.Module, kind: Kind, rows: int, length: int, load: Workload) -> float:
    """Bytes alive at the peak of a pass over a batch, weights and their summed gradients left out.

    Args:
        model: as for `operations`.
        kind: likewise.
        rows: in the batch.
        length: of each row, in tokens.
        load: dtype, attention and checkpointing.
    """

    def measure(part: _LanguagePart) -> float:
        alive = _Alive()
        run(part, kind, rows, length, load, alive)
        return float(alive.peak)

    return _over_layers(model, measure)


def _over_layers(model: nn.Module, measure: Callable[["_LanguagePart"], float]) -> float:
    """A measure of the language model, from that of a few of its layers: it grows by the same with each."""
    base = _base_of(model)
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    name = next((n for n, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child)), None)
    count = len(getattr(decoder, name)) if name else 0
    if name is None or count <= _MORE:
        return measure(_LanguagePart(decoder, head))
    few, more = (measure(_LanguagePart(shortened(decoder, name, layers), head)) for layers in (FEW, _MORE))
    return few + (more - few) * (count - FEW) / (_MORE - FEW)


def image_operations(model: nn.Module, sample: Mapping[str, Any]) -> float:
    """Floating-point operations of the vision tower and the projector over a sample's images, forwards.

    Args:
        model: as for `operations`.
        sample: `pixel_values` and what else the model's `get_image_features` takes.
    """
    base = _base_of(model)
    wanted = inspect.signature(base.get_image_features).parameters
    inputs = {name: value for name, value in sample.items() if name in wanted}
    inputs["pixel_values"] = inputs["pixel_values"].to("meta", next(base.parameters()).dtype)
    with torch.no_grad(), _AllMeta(), FlopCounterMode(display=False) as counter:
        base.get_image_features(**inputs)
    return float(counter.get_total_flops())


def _base_of(model: Any) -> Any:
    """The model inside of its adapter, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def run(
    part: "_LanguagePart", kind: Kind, rows: int, length: int, load: Workload, alive: "_Alive | None" = None
) -> None:
    fake, dtype = FakeTensorMode(allow_non_fake_inputs=True), getattr(torch, load.dtype)
    part = _without_contents(copy.deepcopy(part), fake, dtype)
    if load.attention == "eager":
        part.decoder.set_attn_implementation("eager")
    if load.gradient_checkpointing:
        checkpoint_layers(part.decoder)
    part.train(kind == "training")
    labels = torch.full((rows, length), -100)
    labels[:, length // 2 :] = 0
    with fake:
        states = torch.empty(rows, length, part.width, dtype=dtype)
    act = prepared(part, kind, {"inputs_embeds": states, "labels": labels})
    with fake, alive.watching(part) if alive else nullcontext():
        act()


def prepared(part: "_LanguagePart", kind: Kind, batch: dict[str, Any]) -> Callable[[], Any]:
    """What is to be run inside of the fake mode; made outside, since it looks at the labels."""
    if kind == "per-sample":
        members = members_of(part)
        known = paths_of(part, members, batch)
        known.narrow = dict.fromkeys(dict(part.named_modules()), True)
        return _PassWithoutContents(part, batch, members, known, forget, proving=True).run
    for module in part.modules():
        if isinstance(module, nn.Dropout):  # as on a GPU, where a mask is a byte and not a float
            module.forward = partial(dropout, module)  # type: ignore[method-assign]
    return lambda: step(part, kind, **batch)


def step(part: "_LanguagePart", kind: Kind, inputs_embeds: Tensor, labels: Tensor) -> None:
    """One training step up to the gradients, each of which is let go of when it is there; or a forward pass."""
    mixed = inputs_embeds.dtype != torch.float32
    context = torch.autocast("cpu", inputs_embeds.dtype) if mixed else nullcontext()
    with torch.set_grad_enabled(kind == "training"), context:
        logits = part(inputs_embeds=inputs_embeds).logits
        supervised = logits[:, labels.shape[1] // 2 :].flatten(0, 1).float()
        loss = F.cross_entropy(supervised, torch.zeros(len(supervised), dtype=torch.long))
    if kind == "training":
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda done: setattr(done, "grad", None))
        loss.backward()


def dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    return torch.native_dropout(x, module.p, module.training)[0]


class _LanguagePart(nn.Module):
    """The decoder and the output layer of a model, called on embeddings."""

    def __init__(self, decoder: Any, head: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head
        self.width: int = decoder.config.get_text_config().hidden_size

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def forward(self, inputs_embeds: Tensor, **_: Any) -> SimpleNamespace:
        states = self.decoder(inputs_embeds=inputs_embeds, use_cache=False)[0]
        return SimpleNamespace(logits=self.head(states))


class _PassWithoutContents(BackwardPass):
    """The pass of `icons gradients`; tensors without contents can neither be asked for chance nor be proven right."""

    def forward(self) -> Tensor:
        self.blocks.expect_none()
        with torch.enable_grad():
            losses = self.positions.run(self.model, self.batch)
        self.proving = False  # what backward passes measure for a proof is not part of the others
        return losses


class _AllMeta(TorchDispatchMode):
    """What is computed from a tensor on the meta device is there too, whatever else goes into it.

    Sizes of images stay on the CPU, where a tower may read them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        if any(value.is_meta for value in filter(_is_tensor, tree_leaves(given))):
            given = tree_map_only(Tensor, lambda value: value.to("meta"), given)
        return func(*given[0], **given[1])


class _Alive(TorchDispatchMode):
    """Counts the bytes of what is computed while it is alive; the weights of `model` are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.weights: set[int] = set()
        self.bytes: dict[int, int] = {}

    def watching(self, model: nn.Module) -> "_Alive":
        self.weights = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in filter(_is_tensor, tree_leaves(output)):
            storage = value.untyped_storage()
            key = storage._cdata
            if key not in self.weights and key not in self.bytes:
                self.bytes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, key)
        return output

    def free(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def shortened(decoder: Any, name: str, layers: int) -> Any:
    """The decoder with its first layers alone; shares them with the whole one."""
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    setattr(part, name, getattr(decoder, name)[:layers])
    return part


def _without_contents(part: _LanguagePart, fake: FakeTensorMode, dtype: torch.dtype) -> _LanguagePart:
    """From the meta device, which has no autocast, to a CPU of fake tensors; frozen weights in `dtype`."""
    made: dict[int, Tensor] = {}
    for module in part.modules():
        for held in (module._parameters, module._buffers):
            for name, value in list(held.items()):
                if value is None:
                    continue
                if id(value) not in made:
                    narrow = isinstance(value, nn.Parameter) and not value.requires_grad and value.is_floating_point()
                    with fake:
                        new = torch.empty(value.shape, dtype=dtype if narrow else value.dtype, device="cpu")
                    made[id(value)] = nn.Parameter(new, value.requires_grad) if held is module._parameters else new
                setattr(module, name, made[id(value)])
    return part


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def forget(name: str, block: Tensor, rows: slice) -> None:
    """Takes a block and lets go of it."""
