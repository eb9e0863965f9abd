"""Take tasks from lmms-eval: its prompts, images and scores, by a program that runs in an environment of its own."""
