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
"""The config of a DeciLM checkpoint, for readers that take it from transformers, such as vLLM.

This file lies in the checkpoint and is loaded with `trust_remote_code=True`. Such readers ask for
`config.block_configs[3].attention.no_op`, but transformers knows of no class that reads `block_configs`.
"""

from dataclasses import asdict, dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class AttentionBlock:
    """The attention of a layer; it has `num_attention_heads / n_heads_in_group` KV heads."""

    no_op: bool = False
    n_heads_in_group: int | None = None
    replace_with_linear: bool = False
    sparsify: list | None = None


@dataclass(frozen=True)
class FeedForwardBlock:
    """The MLP of a layer; it has `2 / 3 * ffn_mult * hidden_size` channels, rounded up to a multiple of 256."""

    no_op: bool = False
    ffn_mult: float | None = None
    replace_with_linear: bool = False
    sparsify: list | None = None
    intermediate_size: int | None = None


@dataclass(frozen=True)
class Block:
    """A layer."""

    attention: AttentionBlock
    ffn: FeedForwardBlock


def _block(values, hidden_size):
    if isinstance(values, Block):
        return values
    ffn = {"intermediate_size": None} | values["ffn"]
    if ffn["ffn_mult"] is not None:  # not in config.json, because some readers refuse an entry that they don't know
        ffn["intermediate_size"] = -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256
    return Block(AttentionBlock(**values["attention"]), FeedForwardBlock(**ffn))


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __post_init__(self, **kwargs):
        blocks = kwargs.pop("block_configs", None) or []
        super().__post_init__(**kwargs)
        self.block_configs = [_block(values, self.hidden_size) for values in blocks]

    def to_dict(self):
        values = super().to_dict()
        blocks = [block if isinstance(block, dict) else asdict(block) for block in values.get("block_configs", [])]
        for block in blocks:
            block["ffn"].pop("intermediate_size", None)
        return values | {"block_configs": blocks}
