"""The decoder of the Llama/Qwen family: config, transformer, tokenizer, sampler, import and checkpoints."""
