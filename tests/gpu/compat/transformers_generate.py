"""A small Llama with random weights generates text, with a growing and with a static cache."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from result import Result
from torch_seed import seed


def main():
    seed()
    result = Result()
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to("cuda").eval()
    words = torch.randint(2, 1000, (4, 32), device="cuda")
    common = {"attention_mask": torch.ones_like(words), "max_new_tokens": 48, "do_sample": False}
    grown = model.generate(words, **common)
    static = model.generate(words, cache_implementation="static", disable_compile=True, **common)
    assert grown.shape == static.shape == (4, 80)
    result.output("growing cache", grown)
    result.output("static cache", static)
    half = model.to(torch.bfloat16)
    result.output("bfloat16 logits", half(words).logits)
    torch.cuda.synchronize()
    result.done()


main()
