# Copyright 2025 The rap authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A pruned language model whose layers differ in width: transformers' own model, with the dropped parts left out.

This file lies in the checkpoint and is loaded with `trust_remote_code=True`; it needs nothing but PyTorch and
transformers. The config is that of the unpruned family, with these entries beside it, one number for each layer:

    layer_query_heads   heads of the attention; 0 where the layer has none
    layer_kv_heads      heads of its KV cache; 0 where the layer has no attention
    layer_mlp_channels  channels inside the MLP; 0 where the layer has none
    biased_linears      names of the matrices that have a bias, in all layers

A site that is not there is skipped together with its norm. Attentions are numbered anew, so that the KV cache holds
those that are there, and begins with one even if the first layer has none. `num_attention_heads`,
`num_key_value_heads` and `intermediate_size` are those of the unpruned model; nothing here is computed from them.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class _GatedPruned:
    """In front of a decoder layer of the Llama kind: runs the sites that the layer has."""

    def forward(self, hidden_states, **context):
        if self.self_attn is not None:
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **context)[0]
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states

    def narrow(self, query_heads, kv_heads, mlp_channels, biased):
        """Gives every matrix its size, and takes away what the layer does not have."""
        if query_heads:
            _narrow_attention(self, "o_proj", query_heads, kv_heads, biased)
        else:
            self.self_attn = self.input_layernorm = None
        if mlp_channels:
            hidden_size = self.mlp.down_proj.out_features
            for name in ("gate_proj", "up_proj"):
                setattr(self.mlp, name, nn.Linear(hidden_size, mlp_channels, f"mlp.{name}" in biased))
            self.mlp.down_proj = nn.Linear(mlp_channels, hidden_size, "mlp.down_proj" in biased)
        else:
            self.mlp = self.post_attention_layernorm = None


class _OPTPruned:
    """In front of OPT's decoder layer: the same."""

    def forward(self, hidden_states, **context):
        if self.self_attn is not None:
            normed = self.self_attn_layer_norm(hidden_states)
            hidden_states = hidden_states + self._dropout(self.self_attn(hidden_states=normed, **context)[0])
        if self.fc1 is not None:
            flat = self.final_layer_norm(hidden_states).reshape(-1, hidden_states.shape[-1])
            inner = self.fc2(self.activation_fn(self.fc1(flat))).view(hidden_states.shape)
            hidden_states = hidden_states + self._dropout(inner)
        return hidden_states

    def _dropout(self, states):
        return nn.functional.dropout(states, p=self.dropout, training=self.training)

    def narrow(self, query_heads, kv_heads, mlp_channels, biased):
        if query_heads:
            _narrow_attention(self, "out_proj", query_heads, kv_heads, biased)
            self.self_attn.num_heads = query_heads
        else:
            self.self_attn = self.self_attn_layer_norm = None
        if mlp_channels:
            hidden_size = self.fc2.out_features
            self.fc1 = nn.Linear(hidden_size, mlp_channels, "fc1" in biased)
            self.fc2 = nn.Linear(mlp_channels, hidden_size, "fc2" in biased)
        else:
            self.fc1 = self.fc2 = self.activation_fn = self.final_layer_norm = None


def _narrow_attention(layer, output, query_heads, kv_heads, biased):
    attention = layer.self_attn
    head, hidden_size = attention.head_dim, getattr(attention, output).out_features
    for name, heads in (("q_proj", query_heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        setattr(attention, name, nn.Linear(hidden_size, heads * head, f"self_attn.{name}" in biased))
    setattr(attention, output, nn.Linear(query_heads * head, hidden_size, f"self_attn.{output}" in biased))
    attention.num_key_value_groups = query_heads // kv_heads


class _PrunedCausalLM:
    """In front of a causal LM: its layers are exchanged for narrower ones."""

    layer_class = None

    def __init__(self, config):
        super().__init__(config)
        decoder, attentions = self.get_decoder(), 0
        widths = (config.layer_query_heads, config.layer_kv_heads, config.layer_mlp_channels)
        layers = []
        for index, layer_widths in enumerate(zip(*widths, strict=True)):
            layer = self.layer_class(config, index)
            layer.narrow(*layer_widths, config.biased_linears)
            if layer.self_attn is not None:
                layer.self_attn.layer_idx = attentions
                attentions += 1
            layers.append(layer)
        decoder.layers = nn.ModuleList(layers)
        self.post_init()


class RapPrunedLlamaConfig(LlamaConfig):
    model_type = "rap_pruned_llama"


class _LlamaLayer(_GatedPruned, LlamaDecoderLayer):
    pass


class RapPrunedLlamaForCausalLM(_PrunedCausalLM, LlamaForCausalLM):
    config_class, layer_class = RapPrunedLlamaConfig, _LlamaLayer


class RapPrunedMistralConfig(MistralConfig):
    model_type = "rap_pruned_mistral"


class _MistralLayer(_GatedPruned, MistralDecoderLayer):
    pass


class RapPrunedMistralForCausalLM(_PrunedCausalLM, MistralForCausalLM):
    config_class, layer_class = RapPrunedMistralConfig, _MistralLayer


class RapPrunedQwen2Config(Qwen2Config):
    model_type = "rap_pruned_qwen2"


class _Qwen2Layer(_GatedPruned, Qwen2DecoderLayer):
    pass


class RapPrunedQwen2ForCausalLM(_PrunedCausalLM, Qwen2ForCausalLM):
    config_class, layer_class = RapPrunedQwen2Config, _Qwen2Layer


class RapPrunedQwen3Config(Qwen3Config):
    model_type = "rap_pruned_qwen3"


class _Qwen3Layer(_GatedPruned, Qwen3DecoderLayer):
    pass


class RapPrunedQwen3ForCausalLM(_PrunedCausalLM, Qwen3ForCausalLM):
    config_class, layer_class = RapPrunedQwen3Config, _Qwen3Layer


class RapPrunedOPTConfig(OPTConfig):
    model_type = "rap_pruned_opt"


class _OPTLayer(_OPTPruned, OPTDecoderLayer):
    pass


class RapPrunedOPTForCausalLM(_PrunedCausalLM, OPTForCausalLM):
    config_class, layer_class = RapPrunedOPTConfig, _OPTLayer
