"""The convergence study: what inheritance is worth, arm beside arm under one budget."""
