"""Write the held-out samples of a job file as plain files that a script without this project can read.

    python tests/benchmarks/held_out_samples.py configs/quickstart.yaml held_out/

gives ``held_out/samples.jsonl`` (id, image, prompt, plain_prompt, answers, max_new_tokens) and the images beside it.
"""

import argparse
import json
from pathlib import Path

from optimizer.job.inputs import load_job_task
from optimizer.job.loading import load_job


def write_samples(job_file: Path, directory: Path) -> Path:
    task = load_job_task(load_job(job_file))
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in task.held_out:
        image = directory / "images" / f"{sample.image_key}.png"
        if not image.exists():
            sample.image.open().save(image)
        record = {
            "id": sample.id,
            "image": str(image.relative_to(directory)),
            "prompt": task.spec.prompt.format(question=sample.question),
            "plain_prompt": task.spec.plain_prompt,
            "answers": list(sample.answers),
            "max_new_tokens": task.spec.answer.max_new_tokens,
        }
        lines.append(json.dumps(record))
    samples = directory / "samples.jsonl"
    samples.write_text("\n".join(lines) + "\n")
    return samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job_file", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    print(write_samples(arguments.job_file, arguments.directory))
