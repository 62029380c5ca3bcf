"""A cache in transformers' own `Trainer`: the data set is a `CacheDataset`, the loss `vc.sparse_kl`.

    python examples/hf_trainer.py CACHE STUDENT OUT

For caches of text rows. TRL's `SFTTrainer` does the same as `class CacheSFTTrainer(CacheTrainer, SFTTrainer)`. It takes
none but a `datasets.Dataset`: give it the places of the samples, and look them up when a batch is made:

    SFTConfig(out, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, ...)
    train_dataset=datasets.Dataset.from_dict({"place": range(len(dataset))})
    data_collator=lambda batch: collate([dataset[one["place"]] for one in batch])
"""

import sys
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import vlsi_cache as vc
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import read_records


class CacheTrainer(Trainer):
    """The student learns the teacher's last layer; another cached layer would be `sparse_kl(..., layer=i)`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps have to be averaged

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        rows, places = inputs.pop("rows"), inputs.pop("places")
        # The head is left to the loss, which never holds logits of the whole vocabulary.
        hidden_BSD = model.model(**inputs).last_hidden_state
        hidden = [hidden_SD[place] for hidden_SD, place in zip(hidden_BSD, places, strict=True)]
        losses = [vc.sparse_kl(h_TD, model.lm_head.weight, row) for h_TD, row in zip(hidden, rows, strict=True)]
        counts = losses[0].new_tensor([row.num_tokens for row in rows])
        loss = torch.stack(losses) @ counts / counts.sum()  # the mean over all tokens of the batch
        return (loss, {}) if return_outputs else loss


def main(cache_path: str, student: str, out: str, **options: Any) -> list[float]:
    """Train and save the student; `options` are TrainingArguments. Returns the logged losses, in nats per token."""
    cache = vc.open_cache(cache_path)
    data = spec_from_dict(cache.header.spec, where=cache_path).data
    encoder = load_encoder(student, data.encoding())
    records = {record.id: record for record in read_records(data)}

    def collate(rows: list[Any]) -> dict[str, Any]:
        """Token ids [B, S], padded on the right; a response token is predicted at the position before it."""
        samples = [encoder.encode(records[row.sample_id]) for row in rows]
        ids = [torch.from_numpy(one.input_ids).long() for one in samples]
        places = [slice(one.num_prompt - 1, len(one.input_ids) - 1) for one in samples]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=encoder.pad_id)
        return {"input_ids": input_ids, "rows": rows, "places": places}

    given = {
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "report_to": "none",
        **options,
    }
    arguments = TrainingArguments(out, remove_unused_columns=False, save_strategy="no", disable_tqdm=True, **given)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    dataset: Any = vc.CacheDataset(cache, layers=["last"])
    trainer = CacheTrainer(
        model, arguments, data_collator=collate, train_dataset=dataset, processing_class=encoder.tokenizer
    )
    trainer.train()
    trainer.save_model(out)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    for step, value in enumerate(main(*sys.argv[1:4]), start=1):
        print(f"step {step}: {value:.4f} nats per token")
