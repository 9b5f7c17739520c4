"""What the catalogue constraint costs: beam search on the trie against the same beam search without it.

Same LM, same fused layers, same users, same prompt, beams, number of steps, key-value cache, and log-
probabilities over the whole vocabulary in both ("vocabulary" normalisation), with no stored states: the only
difference is the trie. The unconstrained search is given as many steps as the constrained one took.
``as_shipped`` is the default decoding ("catalogue" normalisation and stored lower states) on the same users.

    python benchmarks/bench_decoding.py --config configs/movielens-1m.yaml --out docs/results/benchmarks
"""

from __future__ import annotations

import torch

from measure import alternate, argument_parser, ratio, write_result
from userllm.cli.configuration import load_config
from userllm.decoding.answers import ClosedAnswers
from userllm.decoding.beam_search import search_answers, search_free
from userllm.pipeline import Run
from userllm.text_in_lm import TextInLM


class _Counting(TextInLM):
    """Counts the steps of a search."""

    steps = 0

    def advance(self, tokens: torch.Tensor, nodes: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return super().advance(tokens, nodes, parents)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--beams", type=int, default=10)
    args = parser.parse_args()
    config, plain = load_config(args.config, ["name=benchmark", "pretrain=null", *args.overrides])
    config.tasks = {"next_item": config.tasks["next_item"]}
    run = Run(config, plain)
    run.through("pretrain")
    model = run.build_model().eval()
    shipped = model.answers["next_item"]
    whole = ClosedAnswers(shipped.prompt_ids, shipped.tree, "vocabulary")
    rows = run.split.examples("test", model.encoder.max_length)[: args.users]
    with torch.no_grad():
        users = model.context(run.stored.batch(rows))
    eos = int(model.tokenizer.eos_token_id)  # type: ignore[arg-type]
    taken: list[int] = []

    def constrained() -> float:
        with torch.no_grad(), model.conditioned(users):
            state = _Counting(model, args.users, "next_item", replay=False)
            search_answers(state, whole, model.head, args.users, args.beams)
        taken.append(state.steps)
        return args.users * (state.steps + 1)

    def free() -> float:
        with torch.no_grad(), model.conditioned(users):
            state = _Counting(model, args.users, "next_item", replay=False)
            search_free(state, shipped.prompt_ids, model.head, args.users, args.beams, eos, taken[-1] + 1)
        return args.users * (state.steps + 1)

    def as_shipped() -> float:
        model.rank_answers("next_item", users, args.beams)
        return args.users

    model.store_lower_states()
    rates = alternate(
        {"constrained": constrained, "unconstrained": free, "as_shipped": as_shipped}, args.rounds
    )
    write_result(
        "decoding",
        {
            "unit": "user steps per second (as_shipped: users per second)",
            "rates_per_s": rates,
            "constrained_over_unconstrained": ratio(rates, "constrained", "unconstrained"),
            "steps": taken[-1],
            "users": args.users,
            "beams": args.beams,
            "lm": model.reference.name,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
