"""Two processes on one machine train as one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.errors import ArgumentError
from headway.train import load_checkpoint, next_token_loss, read_log, train
from headway.train.devices import ManyDevices
from tests.train.small import batch, model


def forget(net, given) -> None:
    net.running = torch.zeros_like(net.running)
    net.training = False


def spread(folder: Path | None, **options):
    """A run without dropout, whose batches have uneven numbers of scored labels."""
    net = model()
    net.dropout.p = 0.0
    # The running buffer sees a process's own rows, so it is taken out.
    net.register_forward_pre_hook(forget)

    def uneven(index: int):
        ids = batch(index)
        labels = ids.clone()
        labels[:2, 3:] = -100
        return {"input_ids": ids, "labels": labels}

    # The last batch of held-out windows may have any number of rows.
    odd = {name: tensor[:3] for name, tensor in uneven(-2).items()}
    return net, train(net, uneven, steps=4, loss=next_token_loss, learning_rate=1e-2, accumulate=2, folder=folder,
                      validation=[uneven(-1), odd], checkpoint_every=2 if folder else None, **options)  # fmt: skip


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.test_devices", str(tmp_path / "run")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in processes:
        error = process.communicate(timeout=900)[1]
        assert process.returncode == 0, error.decode()[-2000:]
    net, alone = spread(None)
    found = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert len(found.parts["random"]) == 2
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found.parts["model"][name], value, rtol=1e-4, atol=1e-6)
    rows = read_log(tmp_path / "run")
    for name in ("loss", "gradient_norm", "accuracy"):
        assert [row[name] for row in rows] == pytest.approx(alone.column(name), rel=1e-4)
    assert rows[-1]["validation_loss"] == pytest.approx(alone.column("validation_loss")[-1], rel=1e-4)
    assert [row["tokens"] for row in rows] == list(alone.column("tokens"))


class Faked:
    """What an Accelerator tells about itself."""

    device, process_index, num_processes = torch.device("cpu"), 0, 3
    distributed_type = "FSDP"

    def prepare_model(self, net):
        return net


def test_models_that_are_split_over_devices_are_refused():
    with pytest.raises(ArgumentError, match="accelerator: got one of type FSDP, which splits the model"):
        ManyDevices(Faked())


def test_rows_that_cannot_be_shared_out_are_refused():
    faked = Faked()
    faked.distributed_type = "MULTI_CPU"
    with pytest.raises(ArgumentError, match="batch: got 4 rows, expected a multiple of the 3 processes"):
        ManyDevices(faked).place(batch(0))


if __name__ == "__main__":
    spread(Path(sys.argv[1]), accelerator="auto")
