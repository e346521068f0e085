"""Sizes of the backbones, from the ``config.json`` of their checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's text decoder, and two properties of its vision part that recipes need.

    Attributes:
        layers: Number of decoder layers.
        heads: Query heads per layer.
        kv_heads: Key-value heads per layer.
        head_dim: Width of a head; in some models it is not ``hidden / heads``.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        vocabulary: Number of rows in the embedding matrix.
        n_parameters: Number of parameters in the LLM, or in the entire model of an existing VLM.
        tied: True if the input and output embeddings share one matrix.
        image_tokens: The largest number of tokens per image under LLaMA-Factory's default pixel limits.
        projector: Name of the module that maps image features into the decoder, as ``additional_target`` needs it.
        linear_widths: Sum of the input and output widths of all linear layers in the text decoder; 0 if each decoder
            layer has the usual seven.
        per_layer_inputs: Width of a second embedding, which gives each layer an input for each token.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    n_parameters: int
    tied: bool = False
    image_tokens: int = 729
    projector: str = "multi_modal_projector"
    linear_widths: int = 0
    per_layer_inputs: int = 0

    @property
    def embeddings(self) -> int:
        """The number of parameters in the input and output embeddings."""
        return self.vocabulary * (self.hidden * (1 if self.tied else 2) + self.per_layer_inputs)

    def lora(self, rank: int) -> int:
        """Counts the parameters of LoRA adapters on every linear layer of the text decoder."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widths = 2 * (self.hidden + query) + 2 * (self.hidden + key) + 3 * (self.hidden + self.intermediate)
        return rank * (self.linear_widths or widths * self.layers)


MERGER = "visual.merger"
GEMMA4 = "embed_vision.embedding_projection"  # PEFT cannot wrap embed_vision, which transformers calls by keyword

#: The sizes of each backbone, by its key in the table of backbones.
SIZES = {
    "qwen2_5_3b": Sizes(36, 16, 2, 128, 2048, 11008, 151936, 3_085_938_688, tied=True),
    "qwen2_5_7b": Sizes(28, 28, 4, 128, 3584, 18944, 152064, 7_615_616_512),
    "qwen2_5_14b": Sizes(48, 40, 8, 128, 5120, 13824, 152064, 14_770_033_664),
    "qwen3_4b": Sizes(36, 32, 8, 128, 2560, 9728, 151936, 4_022_468_096, tied=True),
    "qwen3_8b": Sizes(36, 32, 8, 128, 4096, 12288, 151936, 8_190_735_360),
    "qwen3_14b": Sizes(40, 40, 8, 128, 5120, 17408, 151936, 14_768_307_200),
    "vicuna_7b": Sizes(32, 32, 32, 128, 4096, 11008, 32000, 6_738_415_616),
    "vicuna_13b": Sizes(40, 40, 40, 128, 5120, 13824, 32000, 13_015_864_320),
    "llama3_8b": Sizes(32, 32, 8, 128, 4096, 14336, 128256, 8_030_261_248),
    "qwen2_5_vl_7b": Sizes(28, 28, 4, 128, 3584, 18944, 152064, 8_292_166_656, False, 752, MERGER),
    "qwen3_vl_4b": Sizes(36, 32, 8, 128, 2560, 9728, 151936, 4_437_815_808, True, 576, MERGER),
    "llava_1_5_7b": Sizes(32, 32, 32, 128, 4096, 11008, 32064, 7_063_427_072, image_tokens=576),
    "llava_next_7b": Sizes(32, 32, 8, 128, 4096, 14336, 32064, 7_566_747_648, image_tokens=2928),
    "internvl3_8b": Sizes(28, 28, 4, 128, 3584, 18944, 151674, 7_944_373_760, image_tokens=256),
    "gemma3_4b": Sizes(34, 8, 4, 256, 2560, 10240, 262208, 4_300_079_472, tied=True, image_tokens=256),
    "qwen3_5_4b": Sizes(32, 16, 4, 256, 2560, 9216, 248320, 4_539_265_536, True, 576, MERGER, 2_029_056),
    "qwen3_5_9b": Sizes(32, 16, 4, 256, 4096, 12288, 248320, 9_409_813_744, False, 576, MERGER, 2_704_896),
    "qwen3_vl_8b": Sizes(36, 32, 8, 128, 4096, 12288, 151936, 8_767_123_696, False, 576, MERGER),
    # the MLP's width is the sum over the 8 experts that a token uses
    "qwen3_vl_30b_a3b": Sizes(48, 32, 4, 128, 2048, 6144, 151936, 31_070_754_032, False, 576, MERGER, 835_584),
    "gemma4_e4b": Sizes(42, 8, 2, 256, 2560, 10240, 262144, 7_941_100_832, True, 280, GEMMA4, 2_429_952, 42 * 256),
    "internvl3_5_8b": Sizes(36, 32, 8, 128, 4096, 12288, 151936, 8_528_318_464, image_tokens=256),
    "glm4_1v_9b": Sizes(40, 32, 2, 128, 4096, 13696, 151552, 10_292_777_472, False, 752, MERGER, 2_974_720),
}
