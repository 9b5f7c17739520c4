"""Beam search with a user's texts side by side in one row of the LM, against a row per text.

The ten best items of each user with 20 beams, users' histories read anew; CPU seconds. As User-LLM, which has 8 tokens
before the answer, and as Text Prompt with 50 events written out. Both ways give the same answers, which is checked.

    python benchmarks/bench_text_tree.py --config configs/movielens-1m.yaml
"""

from __future__ import annotations

import time

import torch

from bench_text_prompt import Way
from measure import alternate, argument_parser, ratio, write_result


def main() -> None:
    """See the module."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--beams", type=int, default=20)
    args = parser.parse_args()
    found = {}
    for name in ("user_llm_enc", "text_prompt_lora"):
        way = Way(args, name)
        model = way.model.eval()
        assert model.reads_trees

        def answer(trees: bool, model=model, way=way) -> torch.Tensor:
            model.reads_trees = trees
            with torch.no_grad():
                users = model.context(way.run.stored.batch(way.rows))
            return model.rank_answers("next_item", users, 10, args.beams).answers

        alike = float((answer(True) == answer(False)).float().mean())
        rates = alternate(
            {
                "side_by_side": lambda answer=answer: len(answer(True)),
                "rows": lambda answer=answer: len(answer(False)),
            },
            args.rounds,
            clock=time.process_time,
        )
        found[name] = {
            "users_per_cpu_second": rates,
            "side_by_side_over_rows": ratio(rates, "side_by_side", "rows"),
            "places_alike": alike,
        }
    write_result("text_tree", {"beams": args.beams, "users": args.users, "ways": found}, args.out)


if __name__ == "__main__":
    main()
