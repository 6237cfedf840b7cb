"""`python -m lightning_revlib` is `revlib`."""

from lightning_revlib.cli.main import main

raise SystemExit(main())
