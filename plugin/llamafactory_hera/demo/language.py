"""The demo's language model: a tiny Qwen3, pre-trained on the training text alone."""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .training import optimise

MAX_LENGTH = 512


def new_language_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Five layers of eight query heads over four key-value heads, with random weights.

    ``head_dim`` is not ``hidden_size / heads``, as in Qwen3-4B, so code that divides instead of reading the config
    fails.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = generation_config(tokenizer)
    return model


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy decoding that stops at the end of a turn."""
    return GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )


def pretrain_language_model(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
) -> list[float]:
    """Next-token training on whole documents; no image is seen.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer.
        documents: Text with its chat tokens.
        steps: Number of updates.
        batch_size: Documents a step, drawn at random.
        learning_rate: Highest learning rate.

    Returns:
        The loss of every step, in nats a token.
    """
    encoded = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_LENGTH]) for text in documents]
    # Neighbours in length make a batch, so little of it is padding; attention is causal and padding comes last, so no
    # attention mask is needed.
    encoded.sort(key=len)
    batch_size = min(batch_size, len(encoded))

    def loss(step: int) -> torch.Tensor:
        start = torch.randint(len(encoded) - batch_size + 1, ()).item()
        rows = encoded[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return model(input_ids=ids, labels=labels).loss

    return optimise([model], loss, steps, learning_rate)
