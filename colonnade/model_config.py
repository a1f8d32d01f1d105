"""The sizes of a decoder, under Hugging Face's names, and the checks that refuse unsupported Hugging Face configs.

Model families that this decoder implements, by `model_type`:

    llama       the standard block; biases by `attention_bias` (q, k, v, o) and `mlp_bias`
    mistral     the same, as long as the attention window covers the whole context
    qwen2       biases on q, k and v
    qwen3       RMSNorm of each head's queries and keys before the rotation (arXiv:2505.09388)
    ernie4_5    RoPE rotates neighbouring channels instead of the two halves of a head; all biases by `use_bias`
    smollm3     some layers without RoPE (`no_rope_layers`; arXiv:2501.18795)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from colonnade.errors import UsageError

VOCAB_MULTIPLE = 128
"""The stored vocabulary is padded to a multiple of this, so that its stored shape does not depend on the world size."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "ernie4_5", "smollm3")

# For each RoPE scaling type: the parameters it requires, and the optional ones.
_ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
_LIMITS = {"int": 2**31, "float": math.inf, "bool": 2}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder, under the names of a Hugging Face `config.json`.

    Attributes:
        model_type: the model family (see above), as named in `config.json`.
        rope_scaling: how RoPE frequencies are scaled for a longer context: `rope_type` linear, llama3 or yarn with
            its parameters; None for no scaling.
        no_rope_layers: one number per layer, 0 for a layer without RoPE, else 1; None if all layers have it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    model_type: str = "llama"
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    no_rope_layers: list[int] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, limit = getattr(self, spec.name), _LIMITS.get(str(spec.type))
            if limit is None:
                continue
            if not value < limit:
                raise UsageError(f"model config: {spec.name} is {value:.4g}; it must be below {limit}")
            if spec.type != "bool" and not value > 0:
                raise UsageError(f"model config: {spec.name} is {value}; it must be above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"model config: {self.num_attention_heads} attention heads are not a multiple of "
                f"{self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise UsageError(f"model config: head_dim {self.head_dim} is odd; rotary positions need an even one")
        layers = self.no_rope_layers
        if layers is not None and (len(layers) != self.num_hidden_layers or not all(x in (0, 1) for x in layers)):
            raise UsageError(
                f"model config: no_rope_layers is {layers!r:.80}; it must hold a 0 or 1 for each of the "
                f"{self.num_hidden_layers} layers"
            )

    @property
    def attention_output_bias(self) -> bool:
        """Whether o_proj has a bias; q_proj, k_proj and v_proj have one if `attention_bias` is set."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether RMSNorm is applied to each head's queries and keys before the rotation."""
        return self.model_type == "qwen3"

    @property
    def rope_interleaved(self) -> bool:
        """Whether RoPE rotates the channel pairs (2i, 2i + 1) instead of (i, i + head_dim / 2)."""
        return self.model_type == "ernie4_5"

    def has_rope(self, layer: int) -> bool:
        """Whether the layer with this index has RoPE."""
        return self.no_rope_layers is None or self.no_rope_layers[layer] == 1

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the stored embedding and head. Rows from `vocab_size` on are zero and stay zero."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Parameter count of the whole model, vocabulary padding excluded."""
        return _count(outer_shapes(self)) + self.num_hidden_layers * _count(layer_shapes(self))

    @property
    def num_parameters_without_embeddings(self) -> int:
        """`num_parameters` without embedding and head."""
        return self.num_parameters - (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, vocab_size: int | None = None) -> ModelConfig:
        """Make a config from Hugging Face's keys (or a preset's).

        Args:
            values: the contents of a `config.json`; keys that do not affect the network are ignored.
            vocab_size: used if `values` has none (presets leave it to the tokenizer).

        Raises:
            UsageError: a size is missing or impossible, or the config asks for a feature this decoder lacks.
        """
        values = _with_family_defaults(values)
        _refuse_unsupported(values)
        specs = {spec.name: spec for spec in fields(cls)}
        chosen = {key: value for key, value in values.items() if key in specs and value is not None}
        rope = values.get("rope_parameters") or {}
        if rope.get("rope_theta") is not None:
            chosen["rope_theta"] = rope["rope_theta"]
        chosen["rope_scaling"] = _rope_scaling_of(values)
        if values.get("use_bias"):
            chosen["attention_bias"] = chosen["mlp_bias"] = True
        if values.get("model_type") == "qwen2":
            chosen["attention_bias"] = True
        if all(layer == 1 for layer in chosen.get("no_rope_layers") or ()):
            chosen["no_rope_layers"] = None
        for key, value in chosen.items():
            _require_type(key, value, str(specs[key].type))
        if vocab_size is not None:
            chosen.setdefault("vocab_size", vocab_size)
        heads = chosen.get("num_attention_heads")
        if heads:
            chosen.setdefault("num_key_value_heads", heads)
            if "hidden_size" in chosen and "head_dim" not in chosen:
                if chosen["hidden_size"] % heads:
                    raise UsageError(
                        f"model config: hidden_size {chosen['hidden_size']} is not a multiple of {heads} attention "
                        "heads; give head_dim"
                    )
                chosen["head_dim"] = chosen["hidden_size"] // heads
        missing = sorted(set(_SIZES) - chosen.keys())
        if missing:
            raise UsageError(f"model config: {', '.join(missing)} missing")
        return cls(**chosen)

    @classmethod
    def from_json(cls, path: str | Path, *, vocab_size: int | None = None, flag: str = "--model-config") -> ModelConfig:
        """Read a config from a Hugging Face `config.json` or a folder that holds one; `flag` is the flag that named it.

        Raises `UsageError`.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{flag} {path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{flag} {path}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise UsageError(f"{flag} {path}: holds no JSON object")
        try:
            return cls.from_dict(values, vocab_size=vocab_size)
        except UsageError as error:
            raise UsageError(f"{flag} {path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_SIZES = tuple(spec.name for spec in fields(ModelConfig) if spec.default is MISSING)


def _require_type(key: str, value: Any, kind: str) -> None:
    # type(), not isinstance(): in Python True is an int.
    kinds = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "list[int] | None": (list, type(None)),
    }
    if kind in kinds and type(value) not in kinds[kind]:
        raise UsageError(f"model config: {key} is {value!r:.80}; it must be of type {kind.partition(' |')[0]}")


def _with_family_defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the keys missing from a Hugging Face config with `transformers`' defaults for its model family.

    Llama is left as it is, since its defaults are this decoder's own. Sizes are never guessed, except `head_dim` and
    `num_key_value_heads`.
    """
    model_type = values.get("model_type", "llama")
    optional = {spec.name for spec in fields(ModelConfig)} - set(_SIZES)
    if model_type == "llama" or model_type not in MODEL_TYPES or optional <= values.keys():
        return values
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    given = {key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}
    try:
        theirs = CONFIG_MAPPING[model_type](**given).to_dict()
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(
            f"model config: not one of model_type {model_type!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    guessed = {key: theirs[key] for key in ("head_dim", "num_key_value_heads") if theirs.get(key) is not None}
    filled = {key: value for key, value in theirs.items() if key not in _SIZES}
    return {**filled, **guessed, **values}


def _rope_scaling_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config's RoPE scaling, read from `rope_scaling` or `rope_parameters`; None for none. Raises UsageError."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    needed, possible = _ROPE_SCALINGS[kind]
    scaling: dict[str, Any] = {"rope_type": kind}
    for key in (*needed, *possible):
        value = rope.get(key)
        if value is None and key in needed:
            raise UsageError(f"model config: rope type {kind!r} needs {key}, which is missing")
        if value is not None:
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UsageError(f"model config: {key} of the rope type {kind!r} is {value!r:.80}; it must be above 0")
            scaling[key] = value
    return scaling


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of one layer, by its name within the layer: the only place that lists them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    projections = {
        "self_attn.q_proj": (query, hidden, config.attention_bias),
        "self_attn.k_proj": (key_value, hidden, config.attention_bias),
        "self_attn.v_proj": (key_value, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, query, config.attention_output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns, has_bias) in projections.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,))
    if config.qk_norm:
        norms |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (config.head_dim,))
    return {**shapes, **norms}


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter outside the layers, by name, with the vocabulary unpadded."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (config.hidden_size,),
    }
    return shapes if config.tie_word_embeddings else {**shapes, "lm_head.weight": table}


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Refuse whatever a Hugging Face config asks for that this decoder would silently get wrong. Raises UsageError."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise UsageError(f"model config: {key} is {values[key]!r:.80}; it must be a mapping")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = values.get("layer_types") or ["full_attention"]
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    for name, value, supported in (
        ("model_type", values.get("model_type", "llama"), MODEL_TYPES),
        ("hidden_act", values.get("hidden_act", "silu"), ("silu",)),
        ("rope type", rope_type, ("default", None, *_ROPE_SCALINGS)),
        ("attention_dropout", values.get("attention_dropout") or 0, (0,)),
        ("partial_rotary_factor", 1 if partial is None else partial, (1,)),
        ("quantization_config", values.get("quantization_config"), (None,)),
        *(("a layer of type", layer_type, ("full_attention",)) for layer_type in layer_types),
    ):
        if value not in supported:
            known = " or ".join(repr(item) for item in supported if item is not None) or "none"
            raise UsageError(f"model config: {name} {value!r:.80} is not supported; only {known} is")
    _refuse_sliding_window(values)


def _refuse_sliding_window(values: Mapping[str, Any]) -> None:
    window, context = values.get("sliding_window"), values.get("max_position_embeddings")
    has_window = values.get("use_sliding_window", values.get("model_type") == "mistral")
    if has_window and type(window) is int and type(context) is int and window < context:
        raise UsageError(
            f"model config: sliding_window {window} below max_position_embeddings {context} is not supported; within "
            f"the window attention is the same: set max_position_embeddings to {window} in a copy of the config"
        )
