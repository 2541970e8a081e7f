"""Train MiniGPT-5, or generate replies for a test set: ``python train_eval.py --help``.

Published usage, unchanged::

    export IS_STAGE2=False WEIGHTFOLDER=weights DATAFOLDER=datasets/CC3M
    python train_eval.py --is_training True --train_data_path cc3m_val.tsv --val_data_path cc3m_val.tsv \
        --model_save_name stage1_cc3m_{epoch}-{step} --gpus 0
    python train_eval.py --test_data_path cc3m_val.tsv --test_weight stage1_cc3m.ckpt --gpus 0

``--plan`` prints how much memory a run needs, without weights or a GPU.
"""

import os
import sys
from collections.abc import Sequence

from minigpt5.arguments import parse_arguments, resolve_config
from minigpt5.cli import run_command


def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Raises:
        InputError: a flag, a file or a value that cannot be used.
    """
    arguments = parse_arguments(argv)
    config = resolve_config(arguments, os.environ)
    for notice in arguments.notices:
        print(f"notice: {notice}", file=sys.stderr)
    if arguments.plan is not None:
        from minigpt5.plan import report

        print("\n".join(report(config, arguments.plan)))
        return 0
    # torch and its friends take seconds to import: not before the flags are known to be right.
    from minigpt5.runs import predict, train

    if config.is_training:
        print(f"checkpoint: {train(config)}")
    else:
        print(f"predictions: {predict(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
