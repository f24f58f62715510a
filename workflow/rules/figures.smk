from saeflow.figures.captions import about, caption
from saeflow.figures.registry import declared
from saeflow.figures.report import description
from saeflow.planning.stages import listed

CAPTIONS = f"{BASE}/workflow/report"

# What a report says of data, costs and names is read from summaries, of which there may be thousands, where one is made.
REPORTED = any(argument.startswith("--report") for argument in sys.argv)


def caption_of(figure, key, instance):
    shown = REPORTED and figure in declared()
    data = about(PLAN.results, instance.needs, declared()[figure].stage) if shown else ""
    return caption(figure, CAPTIONS, f".snakemake/captions/{key}", data)


report:
    description(PLAN, CAPTIONS, f".snakemake/captions/{next(iter(PLAN.stages['figures']))}")
    if REPORTED
    else f"{CAPTIONS}/workflow.rst"


# One job draws all figures of the experiment.
for key, instance in PLAN.stages["figures"].items():

    rule:
        name:
            "figures"
        input:
            inputs_of("figures", key),
        output:
            update(PLAN.outputs("figures", [key])),
            [
                update(
                    report(
                        f"results/figures/{key}/{figure}.png",
                        caption=caption_of(figure, key, instance),
                        category=PLAN.experiment,
                        labels={"figure": figure.replace("_", " ")},
                    )
                )
                for figure in instance.config["figures"]
            ],
            [
                update(
                    report(
                        f"results/figures/{key}/table.html",
                        caption=f"{CAPTIONS}/table.rst",
                        category=PLAN.experiment,
                        labels={"figure": "table of all dictionaries"},
                    )
                )
                for _ in listed(instance.needs)[:1]
            ],
        log:
            f"logs/figures/{key}.log",
        localrule: True
        conda:
            "../../environment.yml"
        threads: PLAN.threads("figures")
        resources:
            **resources(PLAN, "figures", [key]),
        params:
            key=shlex.quote(key),
        shell:
            JOB.replace("{wildcards.key:q}", "{params.key}")
