"""What is done to a network to keep its accuracy: one file per method, each the paper's equations and a thin `apply`.

Three kinds share the registration (rows "methods" in `plugins.py`), told apart by what they can do. All are frozen
dataclasses whose fields are their YAML, and whose docstring's first line names the paper.

- a method has `apply(sim, batches)`, and changes encodings and parameters of the calibrated simulation;
- a rewrite has `rewrite(network, batches)` (`backends.base.Rewrite`), and changes the prepared float network before a
  backend wraps it; so rewrites stand before methods;
- a choice has `choose(facts, attempt, note)` (`auto.Auto`), stands alone, and tries chains of the other two.

A method that keeps the exponents it finds, and rounds or corrects by them, says `builds_on_exponents = True`: named
first, it stands behind the default methods (`runs/chains.py`). One that leaves weights on their grids says
`rounds_weights = True`: of two such methods the second finds nothing to do, so only one of them is applied. One that
draws no random numbers says `deterministic = True`: `compare` then runs it for one seed. One that works on weights with
an exponent for each block of inputs says `takes_blocks = True`; rewrites always do.

`batches` can be iterated as often as a method likes. Either takes a further argument if it calls it `progress`: a
`backends.base.Progress`, for the reconstruction error of every layer; a rewrite also one that it calls `plan`: the
`config.QuantPlan` of the simulation to come.
"""
