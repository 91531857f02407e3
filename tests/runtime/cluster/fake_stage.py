"""Run as a stage process by test_supervisor (`python -c`): a backend whose steps do what their first token says."""

import os
import sys
import time

import mlx.core as mx

from exo_kimi.runtime.protocol.messages import Loaded
from exo_kimi.runtime.stage.memory import FreeMemory
from exo_kimi.runtime.stage.prefix_disk import OpenedDisk
from exo_kimi.runtime.stage.process import main
from exo_kimi.runtime.steps import Sampled, StepResult

OUT_OF_MEMORY, MLX_OUT_OF_MEMORY, BUG, SLEEP, COMPUTE, EXIT, LONG_LINE = range(1, 8)


class FakeBackend:
    """Holds nothing. Sizes of what it claims to load come from the environment."""

    def __init__(self):
        self.order = None

    def load(self, order, progress):
        for done in range(11):
            progress(done * 100, 1000)
            time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")) / 10)
        self.order = order
        start, end = order.start_layer, order.end_layer
        return Loaded(start_layer=start, end_layer=end, weights_bytes=1000, cache_step=256, kv_bytes_per_token=10)

    def warm_up(self, after):
        return 0

    def execute(self, step):
        if step.hidden is None and self.order.start_layer == 0:
            self.act(int(step.tokens[0]), step)
        if self.order.end_layer < 7:
            return step
        sampled = tuple(Sampled(seq_id=s.seq_id, token_id=s.length) for s in step.segments if s.sample)
        return StepResult(epoch=step.epoch, step_id=step.step_id, sampled=sampled)

    def run_ahead(self):
        pass

    def act(self, what, step):
        if what == OUT_OF_MEMORY:
            raise MemoryError
        if what == MLX_OUT_OF_MEMORY:
            raise RuntimeError("[malloc] Unable to allocate 1099511627776 bytes.")
        if what == BUG:
            raise KeyError("a bug")
        if what == SLEEP:
            time.sleep(60)
        if what == COMPUTE:
            a = mx.random.normal((512, 512))
            started_s = time.monotonic()
            mx.eval(a @ a)
            b = a
            for _ in range(int(2.0 / (time.monotonic() - started_s)) + 1):
                b = b @ a
            mx.eval(b)  # one call of about 2 s
        if what == LONG_LINE:
            sys.stderr.write("x" * 1_000_000 + "\n")
        if what == EXIT:
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(3)

    def unload(self):
        self.order = None

    def reset(self, epoch, *, keep=False):
        return ()

    def open_disk(self, order, changed):
        return OpenedDisk()

    def experts(self):
        return None

    def tell_progress(self, progress):
        pass

    def held(self):
        return 0, 0

    def memory(self):
        return 1000, 1000

    def free(self):
        return FreeMemory(free_bytes=int(os.environ.get("FAKE_FREE_BYTES", "1000000000")), scope="process")


if __name__ == "__main__":
    sys.exit(main(make_backend=FakeBackend))
