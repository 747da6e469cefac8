"""`python -m hydra_plugins.modal_launcher` is `modal-sweep`."""

if __name__ == "__main__":
    from hydra_plugins.modal_launcher._cli import main

    main()
