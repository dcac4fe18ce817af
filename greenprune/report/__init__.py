"""Reports."""


def print_summary(summary, path):
    print({k: v for k, v in summary.items() if k not in ("removals",)}, path)
