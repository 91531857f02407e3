"""What two neighbouring stages agree on before hidden states go over `mx.distributed`; pure, it opens nothing.

A pair is a group of its own: rank 0 sends, rank 1 receives. So a pair that breaks is made anew without the others, and a machine
needs a cable to its neighbours only.

`ring` is TCP, without encryption: for this machine, or a cable that is yours. `jaccl` is RDMA over Thunderbolt 5 (macOS 26.2 and
later, after `rdma_ctl enable`). Its configuration is built and tested here; it has never run, for that takes two such Macs.

Source: MLX's documentation, usage/distributed ("Getting started with RING", "JACCL") and its ring.cpp and jaccl.cpp.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from exo_kimi.errors import StageUnreachableError
from exo_kimi.runtime.protocol.messages import Backend

LENGTH_BYTES = 8  # of the size before bytes that are handed to a link helper


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two neighbouring stages as a group of `mx.distributed`: where both sides meet, and by which devices.

    Args:
        backend: of `mx.distributed`.
        sender: `IP:PORT` where rank 0 listens while the pair is made; jaccl's coordinator.
        receiver: `IP:PORT` where rank 1 listens; the ring alone uses it.
        sender_device: RDMA device of rank 0 that leads to rank 1, such as rdma_en5.
        receiver_device: of rank 1 that leads to rank 0.
    """

    backend: Backend
    sender: str
    receiver: str
    sender_device: str | None = None
    receiver_device: str | None = None

    def to_json(self) -> str:
        """The fields as JSON, which a link helper gets as an argument."""
        return json.dumps(asdict(self))

    def environment(self, rank: int, folder: Path) -> dict[str, str]:
        """What `mx.distributed.init` reads, by name; the paths are in `folder`, where `files` belong."""
        if self.backend == "ring":
            return {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")}
        return {
            "MLX_RANK": str(rank),
            "MLX_IBV_DEVICES": str(folder / "devices.json"),
            "MLX_JACCL_COORDINATOR": self.sender,
        }

    def files(self) -> dict[str, str]:
        """The files that the environment names, with their text."""
        if self.backend == "ring":
            return {"hosts.json": json.dumps([[self.sender], [self.receiver]])}
        # Row: of; column: to. null is no way, which is only right for a rank to itself.
        return {"devices.json": json.dumps([[None, self.sender_device], [self.receiver_device, None]])}


def rdma_device(ifconfig: str, ip: str) -> str:
    """The RDMA device of the network interface that has an address: macOS calls that of en5 rdma_en5.

    Args:
        ifconfig: what `ifconfig` prints.
        ip: an address of this machine, on the cable to the neighbour.

    Raises:
        StageUnreachableError: no interface has it, or it is no Thunderbolt port but a bridge of them, or the loopback.
    """
    for block in re.split(r"\n(?=\S)", ifconfig):
        name = block.partition(":")[0].strip()
        if ip in re.findall(r"^\s+inet6? ([0-9a-fA-F.:]+)", block, flags=re.MULTILINE):
            if re.fullmatch(r"en\d+", name):
                return f"rdma_{name}"
            raise StageUnreachableError(
                "this address is not on a Thunderbolt port of its own",
                expected="an interface en0, en1, ...",
                found=name,
                where=ip,
                fix="take the port out of the Thunderbolt bridge and give it an address, then name that one in --stage",
            )
    raise StageUnreachableError(
        "no interface of this machine has the address",
        where=ip,
        fix="name an address of the Thunderbolt cable in --stage",
    )
