"""`python -m modal_sweep` is `modal-sweep`."""

if __name__ == "__main__":
    from modal_sweep.cli import main

    main()
