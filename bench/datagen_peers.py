"""Clients of bench/datagen.py that run in a peer's own environment: `python bench/datagen_peers.py NAME --rows N --concurrency C --url U`.

Prints seconds from rows at hand to replies at hand. Each is used as its own documentation says, with limits and caches out of the way.
"""

import argparse
import json
import os
import tempfile
import time


def prompts(rows: int) -> list[str]:
    return [f"Question {n}: what is {n} times {n + 1}, and why would anyone ask?" for n in range(rows)]


def curator(rows: int, concurrency: int, url: str) -> float:
    os.environ |= {
        "OPENAI_API_KEY": "none",
        "CURATOR_DISABLE_RICH_DISPLAY": "1",
        "CURATOR_CACHE_DIR": tempfile.mkdtemp(),
        "TELEMETRY_ENABLED": "0",
    }
    import litellm  # its directory holds the tokenizer that curator would otherwise download

    os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(os.path.dirname(litellm.__file__), "litellm_core_utils", "tokenizers")
    from bespokelabs import curator
    from datasets import Dataset

    class Ask(curator.LLM):
        def prompt(self, row: dict) -> str:
            return row["prompt"]

        def parse(self, row: dict, response: str) -> dict:
            return {"reply": response}

    limits = {"max_requests_per_minute": 10**7, "max_tokens_per_minute": 10**10, "max_concurrent_requests": concurrency}
    ask = Ask(
        model_name="chaos", backend="openai", backend_params={"base_url": url, "api_key": "none", **limits},
        generation_params={"temperature": 0.8, "top_p": 0.95, "max_tokens": 256},
    )  # fmt: skip
    given = Dataset.from_dict({"prompt": prompts(rows)})
    began = time.perf_counter()
    found = ask(given)
    found = getattr(found, "dataset", found)
    seconds = time.perf_counter() - began
    assert len(found) == rows and all(found["reply"])
    return seconds


def distilabel(rows: int, concurrency: int, url: str) -> float:
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps.tasks import TextGeneration

    with Pipeline("bench") as pipeline:
        TextGeneration(
            llm=OpenAILLM(
                model="chaos", base_url=url, api_key="none", generation_kwargs={"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256}
            ),
            input_batch_size=concurrency,
        )
    given = [{"instruction": text} for text in prompts(rows)]
    began = time.perf_counter()
    found = pipeline.run(dataset=__import__("datasets").Dataset.from_list(given), use_cache=False)
    seconds = time.perf_counter() - began
    replies = found["default"]["train"]["generation"]
    assert len(replies) == rows and all(replies)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["curator", "distilabel"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--url")
    given = parser.parse_args()
    print(json.dumps({"curator": curator, "distilabel": distilabel}[given.name](given.rows, given.concurrency, given.url)))
