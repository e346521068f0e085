"""``torchrun -m llamafactory_hera.v1 recipe.yaml``: HeRA in LLaMA-Factory's v1 engine."""

from .integrations.llamafactory_v1 import main

if __name__ == "__main__":
    main()
