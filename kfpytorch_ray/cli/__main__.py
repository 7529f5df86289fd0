"""``python -m kfpytorch_ray.cli``: the command line where its script is not on the PATH."""

from kfpytorch_ray.cli.group import main

if __name__ == "__main__":
    main(prog_name="kfpytorch-ray")
