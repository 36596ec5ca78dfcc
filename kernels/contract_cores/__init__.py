"""`compress::contract_cores`: the cores of a matrix product operator to a float weight."""
