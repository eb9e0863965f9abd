"""Run requests in vLLM and print what it answers, as JSON: a program for the interpreter that holds vLLM.

It reads a JSON list of tasks from standard input, each with ``model``, ``options`` of ``vllm.LLM``, ``new_tokens``, and
``waves``, lists of requests (``prompt``, ``images``) of which each is given to vLLM at once, one wave behind the other.
Of a task that vLLM refuses it prints the error. ``all_rows`` has frozen layers attend with all rows as queries, as they
do with the attention backends of GPUs.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any


def answers(task: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image
    from vllm import LLM, SamplingParams

    if task["all_rows"]:
        from skipplan_vllm import step

        step.CPU_ATTENTION = "none"
    model = LLM(task["model"], dtype="float32", max_logprobs=-1, seed=0, **task["options"])
    sampling = SamplingParams(temperature=0, max_tokens=task["new_tokens"], logprobs=-1, ignore_eos=True)
    found = []
    for wave in task["waves"]:
        requests = []
        for request in wave:
            images = [Image.open(path).convert("RGB") for path in request["images"]]
            data = {"multi_modal_data": {"image": images}} if images else {}
            requests.append({"prompt": request["prompt"], **data})
        for output in model.generate(requests, sampling, use_tqdm=False):
            completion = output.outputs[0]
            found.append(
                {
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached_tokens": output.num_cached_tokens,
                    "tokens": list(completion.token_ids),
                    "logprobs": [
                        [position[token].logprob for token in range(len(position))] for position in completion.logprobs
                    ],
                }
            )
    return {"answers": found, "blocks": model.llm_engine.vllm_config.cache_config.num_gpu_blocks}


def main() -> None:
    for task in json.load(sys.stdin):
        try:
            result = answers(task)
        except Exception as error:
            result = {"error": str(error)}
        print("RESULT " + json.dumps(result), flush=True)
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main()
