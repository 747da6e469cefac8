"""`python -m hydra_plugins.modal_launcher` is `modal-sweep`."""

if __name__ == "__main__":
    from modal_sweep.cli import main

    main()
