"""Mixed precision: a format for every layer, chosen to do the least damage within a size.

1. Every weight is quantized in every format of the menu, with the calibration statistics and the solver that
   the final weights get: rounding without them misranks layers at 2 and 3 bits.
2. The damage of each is measured on samples held out from 1: the model runs with that one layer quantized, and
   its outputs are compared (`compress.sensitivity`). To first order damages add up; small ones cannot fall
   with precision except by noise, which is removed (`isotonic`).
3. The allocator finds the formats of least summed damage within the budget (`compress.passes.solvers.allocate`).
   Linear layers that read the same input (q, k and v; gate and up) get the same one, as runtimes fuse them.
4. Damages do not quite add up, least of all at 2 bits. So the most sensitive layers are measured again with all
   others in their new formats, and the choice is made once more. Of these two and every uniform format that
   fits, the one of least measured damage stays.
5. One sequential sweep quantizes the weights in the chosen formats, on all samples.

Sources: the problem is that of HAWQ-V2 (Dong et al. 2020, section 3) with measured divergence for their
Hessian traces; `search: policy` is the search of FLIQS (Dotzel et al. 2023), see
`compress.passes.solvers.policy`.
"""
