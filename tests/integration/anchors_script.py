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

from helpers import preparation

from bapo_plugin.answers import transformers
from bapo_plugin.store import Store


def main(config: str, pause: float) -> None:
    count = transformers._Counted.__call__

    def slow(self, *args, **kwargs):
        time.sleep(pause)
        return count(self, *args, **kwargs)

    put = Store.put

    def told(self, kind, *args, **kwargs):
        put(self, kind, *args, **kwargs)
        if kind == "anchor":
            print("STORED", flush=True)

    transformers._Counted.__call__, Store.put = slow, told
    work = preparation(config)
    made_by = work.made_by()
    keyed = work.keyed(work.rendered(keep=True), made_by)
    with Store(work.store_path) as store:
        print("START", flush=True)
        summary = work.make_missing(keyed, made_by, store)
    print("GENERATED", summary.generated_tokens, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
