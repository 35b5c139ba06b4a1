"""A Hugging Face Trainer script, unchanged: it resumes from its own last checkpoint if it has one.

    perdure run --nproc-per-node 2 examples/train_hf.py --output /tmp/hf --steps 200

The model is tiny and random and its data are made here: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that count upwards from a place that differs from row to row."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(16) + index) % 64
        return {"input_ids": row, "labels": row}


def last_whole_checkpoint(output: Path) -> str | None:
    """The Trainer writes its files in place: a folder that a kill cut off is passed over.

    `trainer_state.json` comes last of rank 0's files; those of torch.save are zip archives, whose
    directory stands at their end.
    """
    whole = [
        file.parent
        for file in output.glob("checkpoint-*/trainer_state.json")
        if all(zipfile.is_zipfile(part) for part in file.parent.glob("*.pt*"))
    ]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def main() -> None:
    parser = argparse.ArgumentParser(description="train a tiny GPT-2 with the Trainer")
    parser.add_argument("--output", type=Path, default=Path("hf-out"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            save_steps=20,
            save_total_limit=2,
            logging_steps=20,
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
            ddp_backend=None if torch.accelerator.is_available() else "gloo",
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
        ),
        train_dataset=Counting(),
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output))
    print(f"done: step {trainer.state.global_step}", flush=True)


if __name__ == "__main__":
    main()
