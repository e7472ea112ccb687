"""Started by test_anchors.py: make base responses slowly, so that the test can kill it at any moment."""

import os
import sys
import time
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "AXOLOTL_LOG_LEVEL": "WARNING",
}
sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import anchor_sources

from bapo_plugin.anchors import engines
from bapo_plugin.anchors.generate import make_anchors, make_plan, store_path
from bapo_plugin.store import Store


def main(config: str, pause: float) -> None:
    count = engines._Counted.__call__

    def slow(self, *args, **kwargs):
        time.sleep(pause)
        return count(self, *args, **kwargs)

    put = Store.put

    def told(self, kind, *args, **kwargs):
        put(self, kind, *args, **kwargs)
        if kind == "anchor":
            print("STORED", flush=True)

    engines._Counted.__call__, Store.put = slow, told
    cfg, tokenizer, sources = anchor_sources(config)
    with Store(store_path(cfg)) as store:
        plan = make_plan(cfg, tokenizer, sources, None, store)
        print("START", flush=True)
        _, summary = make_anchors(cfg, tokenizer, plan, None, store)
    print("GENERATED", summary.generated_tokens, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
