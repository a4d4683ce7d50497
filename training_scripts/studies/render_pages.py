"""Render all pages of the studies again from the committed figures, after a change of their wording. Runs no study.

    python training_scripts/studies/render_pages.py

`reproduce_table.py --collect` draws the plots and writes the tables on the cards, too.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import attribute_controls
import audit_controls
import benchmark_attacks
import benchmark_screening
import benchmark_workers
import caption_attacks
import claimed.page
import claimed.summary
import compare_mitigations
import copy_detection
import duplicate_scan
import few_held_out
import filter_remedy
import growth
import later_attacks
import measured_epsilon
import paper_table.page
import person_intervals
import power
import quality_rewards
import real_searches
import screened.paired_page
import screened_replay
import screening_predicts
import screening_singular
import screening_smallest
import search_memory
import selection
import trials.page
from common.pages import read_results, write_results

PAGES: dict[str, Callable[[dict], str]] = {
    "results/paper_table": paper_table.page.render,
    "trials": trials.page.render,
    "mitigations_comparison": compare_mitigations.render,
    "audit_controls": audit_controls.render,
    "attack_cost": benchmark_attacks.render,
    "workers": benchmark_workers.render,
    "results/screening_demo": screening_predicts.render,
    "results/screening_elpv": screening_predicts.render,
    "results/benchmark_screening": benchmark_screening.render,
    "results/screened_replay": screened_replay.render,
    "results/copy_detection": copy_detection.render,
    "results/duplicate_scan": duplicate_scan.render,
    "results/attribute_controls": attribute_controls.render,
    "results/filter_remedy": filter_remedy.render,
    "results/later_attacks": later_attacks.render,
    "results/measured_epsilon": measured_epsilon.render,
    "results/person_intervals": person_intervals.render,
    "results/few_held_out": few_held_out.render,
    "results/search_memory": search_memory.render,
    "results/screening_paired": screened.paired_page.render,
    "results/screening_smallest": screening_smallest.render,
    "results/real_searches": real_searches.render,
    "results/screening_singular": screening_singular.render,
    "results/claims": claimed.page.render,
    "results/selection": selection.render,
    "results/power": power.render,
    "results/growth": growth.render,
    "results/quality_rewards": quality_rewards.render,
    "results/caption_attacks": caption_attacks.render,
}


def main() -> None:
    """Render the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs_dir", type=Path, default=Path("docs"), help="folder of the figures and the pages")
    args = parser.parse_args()
    for name, render in PAGES.items():
        file = args.docs_dir / f"{name}.json"
        results = read_results(file)
        write_results(file, results, render(results))
    results = read_results(args.docs_dir / "results" / "claims.json")
    (args.docs_dir / "results.md").write_text(claimed.summary.render_summary(results), encoding="utf-8")


if __name__ == "__main__":
    main()
