"""The KV cache that encodes each token once and hands out codes, never a decoded copy.

B batch, G KV heads, S tokens, D head_dim. `attention.py` has the function that reads the codes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...errors import OctavoError, first_line
from ..model_sizes import KV_SHARE, check_cache_sizes, head_dim_of, kv_heads_of
from ..rotary import rope_constants
from ..schemes.kv_scheme import CROP_ROOM, Scheme, load_scheme
from ..static_scales import LayerScales, Scales, load_statistics, scales_of, settled
from .cache_file import Tensors, named, part_of, read_cache_file, scales_from, write_cache_file
from .quantized_layer import QuantizedLayer, StaticQuantizedLayer
from .sliding import sliding_windows


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How a cache was made; the arguments of `QuantizedCache` that every layer shares, and the sizes of its model.

    Attributes:
        share: which KV heads of the model these are, where one of several ranks holds the cache; see `sharding/`.
    """

    max_length: int | None
    offloading: bool
    compileable: bool
    crop_room: int
    kv_heads: int
    head_dim: int
    share: str | None = None


class QuantizedCache(Cache):
    """A cache that stores codes, for any decoder-only model of transformers that attends over all tokens.

    Layers that the config says slide keep the tokens of their window, as `DynamicCache(config)` does, and `crop_room`
    more; so does a cache with a `max_length`, but not a compileable one.

    Two lines make a stock model use it: `octavo.prepare(model)`, and then
    `model.generate(..., cache=QuantizedCache(model.config, scheme="int8-token"))`.

    Args:
        config: the model's config.
        scheme: name of a preset, or a `Scheme`.
        statistics: file of calibration statistics, from which a static scheme takes its scales.
        scales: the scales themselves, one `LayerScales` per layer, instead of statistics.
        max_length: allocate room for this many tokens at once and never move; None grows geometrically.
        offloading: keep on the accelerator only the layer in use (as in `DynamicCache`).
        compileable: count the tokens on the device, so that `torch.compile` and CUDA graphs serve every step with one
            graph; needs `max_length`, and nobody checks that the tokens fit.
        crop_room: how many of the newest tokens `crop` can always remove, as speculative decoding does with those that
            it rejects. Schemes that code tokens later than they come keep the floats of so many beside their codes, in
            16 bits; the others can be cropped anywhere, but where layers slide.

    Raises:
        OctavoError: unknown scheme; a static scheme without statistics; statistics of another model; layers that the
            cache does not serve (linear attention).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        scheme: str | Scheme = "int8-token",
        statistics: str | Path | None = None,
        scales: Scales | None = None,
        max_length: int | None = None,
        offloading: bool = False,
        compileable: bool = False,
        crop_room: int = CROP_ROOM,
    ) -> None:
        if type(crop_room) is not int or crop_room < 0:
            raise OctavoError(f"crop_room={crop_room!r} is no number of tokens, 0 for none")
        if compileable and (max_length is None or offloading):
            raise OctavoError("compileable=True needs max_length, and excludes offloading")
        model_config, config = config, config.get_text_config(decoder=True)
        self.scheme = load_scheme(scheme)
        others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if others:
            raise OctavoError(
                f"QuantizedCache serves attention over k and v; this model has {', '.join(sorted(others))}"
            )
        check_cache_sizes(config)
        count = config.num_hidden_layers
        self.scheme = self.scheme.of_model(count)
        if scales is None and self.scheme.is_static:
            if statistics is None:
                raise OctavoError(
                    f"scheme {self.scheme.name} has static scales; pass statistics=FILE, which --save_statistics writes"
                )
            found = load_statistics(statistics)
            found.check_model(model_config)
            scales = scales_of(self.scheme, found)
        if scales is not None and len(scales) != count:
            raise OctavoError(f"there are scales for {len(scales)} layers and the model has {count}: another model's?")
        self.scheme = settled(self.scheme, scales or [])
        self._set_layers(
            [self.scheme.of_layer(index) for index in range(count)],
            scales or [LayerScales()] * count,
            sliding_windows(config),
            [rope_constants(config, head_dim_of(config), index)[0] for index in range(count)],
            CacheOptions(
                max_length,
                offloading,
                compileable,
                crop_room,
                kv_heads_of(config),
                head_dim_of(config),
                getattr(config, KV_SHARE, None),
            ),
        )

    def _set_layers(
        self,
        schemes: list[Scheme],
        scales: Scales,
        windows: list[int | None],
        frequencies: list[torch.Tensor],
        options: CacheOptions,
    ) -> None:
        self._options = options
        layers = []
        for scheme, layer_scales, window, angles in zip(schemes, scales, windows, frequencies, strict=True):
            arguments = (scheme, layer_scales, options.max_length, angles, options.crop_room)
            is_static = options.compileable
            layers.append(StaticQuantizedLayer(*arguments) if is_static else QuantizedLayer(*arguments, window))
        super().__init__(layers=layers, offloading=options.offloading, offload_only_non_sliding=False)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As in transformers: encode and append the `[B, G, S, D]` states of a layer; return handles to all codes.

        Raises:
            OctavoError: there is no such layer in the cache, or what it holds is of other heads or another batch.
        """
        if layer_idx >= len(self.layers):
            raise OctavoError(f"the cache is of {len(self.layers)} layers and the model has more: another model's?")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def expect(self, tokens: int) -> None:
        """Make room for so many tokens in all, when any is made, as for the chunks of a long pass."""
        for layer in self.layers:
            layer.key_store.expect(tokens)
            layer.value_store.expect(tokens)

    def save(self, file: str | Path) -> None:
        """Write all that the cache holds, its scheme and constants, to a safetensors file, whole or not at all.

        Raises:
            OctavoError: it cannot be written.
        """
        facts: dict[str, Any] = {"scheme": self.scheme.to_dict(), "options": dataclasses.asdict(self._options)}
        tensors, facts["layers"] = {}, []
        for index, layer in enumerate(self.layers):
            counts, parts = layer.saved()
            facts["layers"].append(counts)
            tensors |= named(f"layers.{index}.", parts)
        write_cache_file(Path(file), facts, tensors)

    @classmethod
    def load(
        cls, file: str | Path, device: torch.device | str | None = None, config: PreTrainedConfig | None = None
    ) -> "QuantizedCache":
        """The cache that `save` wrote: going on from it gives what going on from that one would, bit for bit.

        Args:
            file: what was written.
            device: where the model is; None: the CPU.
            config: the model's config, to refuse a cache of other sizes at once and not at its first use.

        Raises:
            OctavoError: the file is no cache, of another version or damaged; its scheme is unknown; its sizes are not
                those of `config`.
        """
        facts, tensors = read_cache_file(Path(file))
        try:
            cache = cls.__new__(cls)
            cache._restore(facts, tensors, torch.device(device or "cpu"))
        except OctavoError as error:
            raise OctavoError(f"{file}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise OctavoError(f"{file}: is no whole cache ({first_line(error)}); save it again") from None
        if config is not None:
            cache._check_model(str(file), config.get_text_config(decoder=True))
        return cache

    def _restore(self, facts: dict[str, Any], tensors: Tensors, device: torch.device) -> None:
        self.scheme, options = load_scheme(facts["scheme"]), CacheOptions(**facts["options"])
        parts = [part_of(tensors, f"layers.{index}.") for index in range(len(facts["layers"]))]
        self._set_layers(
            [self.scheme.of_layer(index) for index in range(len(parts))],
            [scales_from(part, counts["folded"]) for part, counts in zip(parts, facts["layers"], strict=True)],
            [counts["window"] for counts in facts["layers"]],
            [part["frequencies"] for part in parts],
            options,
        )
        for layer, part, counts in zip(self.layers, parts, facts["layers"], strict=True):
            batch = next((value.shape[0] for name, value in part.items() if name.startswith("key.")), 1)
            layer.restore(counts, part, torch.empty((batch, options.kv_heads, 0, options.head_dim), device=device))

    def _check_model(self, where: str, config: PreTrainedConfig) -> None:
        """Raise an `OctavoError` unless the cache is of the sizes, and of the KV heads, of a decoder's config."""
        ours = {"layers": len(self.layers), "KV heads": self._options.kv_heads, "head_dim": self._options.head_dim}
        theirs = (config.num_hidden_layers, kv_heads_of(config), head_dim_of(config))
        for (name, found), wanted in zip(ours.items(), theirs, strict=True):
            if found != wanted:
                raise OctavoError(f"{where}: is a cache of another model: {name} {found}, and this model has {wanted}")
        self.check_share(where, config)
        if not self._options.compileable and [layer.window for layer in self.layers] != sliding_windows(config):
            raise OctavoError(f"{where}: is a cache of another model, whose layers slide otherwise")

    def check_share(self, where: str, config: PreTrainedConfig) -> None:
        """Raise an `OctavoError` unless the KV heads are those that a decoder's config has of its model."""
        theirs = getattr(config, KV_SHARE, None)
        if self._options.share != theirs:
            whole = "all KV heads"
            raise OctavoError(
                f"{where}: holds {self._options.share or whole} of its model, and this one has {theirs or whole}: "
                "each rank saves and loads a file of its own, and one process one of all"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in every layer, or in none, as `QuantizedLayer.crop` says."""
        amount = int(tokens_to_remove)  # a tensor in some versions of transformers
        for layer in self.layers:
            layer.check_crop(amount)
        super().crop(amount)

    def nbytes(self) -> int:
        """Bytes allocated for codes and dynamic scales, unused capacity included; `used_nbytes` has those in use.

        Storage grows in steps, so that up to a quarter of it waits for tokens; with `max_length` all is there at once.
        """
        return sum(layer.key_store.nbytes() + layer.value_store.nbytes() for layer in self.layers)

    def used_nbytes(self) -> int:
        """Bytes of what the tokens in the cache take: codes, dynamic scales, and what is kept in float."""
        found = 0
        for layer in self.layers:
            tokens = int(layer.get_seq_length())
            for store in (layer.key_store, layer.value_store):
                found += sum(part.nbytes for part in store.saved(tokens)[1].values())
        return found
