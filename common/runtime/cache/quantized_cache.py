"""The KV cache that encodes each token once and hands out codes, never a decoded copy.

B batch, G KV heads, S tokens, D head_dim. `attention.py` has the function that reads the codes.
"""

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...errors import OctavoError
from ..model_sizes import check_cache_sizes, head_dim_of
from ..rotary import rope_constants
from ..schemes.kv_scheme import CROP_ROOM, Scheme, load_scheme
from ..static_scales import Scales, load_statistics, scales_of
from .quantized_layer import QuantizedLayer, StaticQuantizedLayer
from .sliding import sliding_windows


class QuantizedCache(Cache):
    """A cache that stores codes, for any decoder-only model of transformers that attends over all tokens.

    Layers that the config says slide keep the tokens of their window, as `DynamicCache(config)` does, and `crop_room`
    more; so does a cache with a `max_length`, but not a compileable one.

    Two lines make a stock model use it: `prepare(model)` of `folds.py`, and then
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
        if self.scheme.layers_named > count:
            raise OctavoError(
                f"scheme {self.scheme.name}: names layer {self.scheme.layers_named - 1} of a model of {count} layers"
            )
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
        layers = []
        for index, window in enumerate(sliding_windows(config)):
            layer_scales = scales[index] if scales else None
            frequencies = rope_constants(config, head_dim_of(config), index)[0]
            arguments = (self.scheme.of_layer(index), layer_scales, max_length, frequencies, crop_room)
            layers.append(StaticQuantizedLayer(*arguments) if compileable else QuantizedLayer(*arguments, window))
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=False)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest `-tokens_to_remove` tokens in every layer, or in none, as `QuantizedLayer.crop` says."""
        amount = int(tokens_to_remove)  # a tensor in some versions of transformers
        for layer in self.layers:
            layer.check_crop(amount)
        super().crop(amount)

    def nbytes(self) -> int:
        """Bytes allocated for codes and dynamic scales, unused capacity included."""
        return sum(layer.key_store.nbytes() + layer.value_store.nbytes() for layer in self.layers)
