# One job a store: one forward pass fills every column that some point needs and that is not there yet.
for batch in PLAN.batches["activations"]:

    rule:
        name:
            f"activations_{short_hash(batch)}"
        input:
            PLAN.inputs("activations", *batch),
        output:
            PLAN.outputs("activations", batch),
        log:
            f"logs/activations/{short_hash(batch)}.log",
        conda:
            "../../environment.yml"
        threads: PLAN.threads("activations")
        resources:
            **PLAN.resources("activations"),
        params:
            select=key_options(batch),
            config=PLAN.param("activations", *batch),
        shell:
            job("activations")
