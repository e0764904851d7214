"""`python -m t2i_experts` is `t2i-experts`; `accelerate launch -m t2i_experts train CONFIG` comes through here."""

from __future__ import annotations

from t2i_experts.cli.app import main

if __name__ == "__main__":
    main()
