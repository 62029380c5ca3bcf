"""Your own trainer on a cache: any training loop, with `vc.sparse_kl` as its loss.

    python examples/own_trainer.py CACHE STUDENT OUT

The student is plain transformers, the data a torch `DataLoader`; nothing of the teacher is loaded. This one learns the
teacher's last layer, for caches of text rows. `layer=i` compares with any other cached layer.
"""

import sys
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import vlsi_cache as vc
from vlsi_cache.config.spec import spec_from_dict
from vlsi_cache.data.encoder import load_encoder
from vlsi_cache.data.records import read_records


def main(cache_path: str, student: str, out: str, *, epochs: int = 1, batch_size: int = 8) -> list[float]:
    """Train for some epochs and save the student into `out`; returns the loss of every step, in nats per token."""
    cache = vc.open_cache(cache_path)
    data = spec_from_dict(cache.header.spec, where=cache_path).data
    encoder = load_encoder(student, data.encoding())
    records = {record.id: record for record in read_records(data)}
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def collate(rows: list[Any]) -> tuple[torch.Tensor, list[Any], list[slice]]:
        """Token ids [B, S], padded on the right, the rows, and where each one's distributions are predicted."""
        samples = [encoder.encode(records[row.sample_id]) for row in rows]
        # A response token is predicted at the position before it.
        places = [slice(one.num_prompt - 1, len(one.input_ids) - 1) for one in samples]
        ids = [torch.from_numpy(one.input_ids).long() for one in samples]
        return pad_sequence(ids, batch_first=True, padding_value=encoder.pad_id), rows, places

    dataset = vc.CacheDataset(cache, layers=["last"])
    losses = []
    for epoch in range(epochs):
        order = vc.PartWindowSampler(dataset, seed=0, epoch=epoch)
        for input_ids, rows, places in DataLoader(dataset, batch_size, sampler=order, collate_fn=collate):
            # The head is left to the loss, which never holds logits of the whole vocabulary.
            hidden_BSD = model.model(input_ids=input_ids).last_hidden_state
            total = torch.zeros(())
            for hidden_SD, row, place in zip(hidden_BSD, rows, places, strict=True):
                loss = vc.sparse_kl(hidden_SD[place], model.lm_head.weight, row)
                total = total + loss * row.num_tokens
            mean = total / sum(row.num_tokens for row in rows)
            mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(mean.detach()))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(student).save_pretrained(out)
    return losses


if __name__ == "__main__":
    for step, value in enumerate(main(*sys.argv[1:4]), start=1):
        print(f"step {step}: {value:.4f} nats per token")
