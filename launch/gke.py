r"""Starts a job on a slice of a Kubernetes cluster (GKE): a JobSet, whose hosts are its pods.

    python launch/gke.py --name hate --image REGION-docker.pkg.dev/PROJECT/REPO/safetydpo \
        --topology v6e:4x4 -- train --config hate:sdxl --config.pairs.path=gs://BUCKET/pairs/hate \
        --config.batch_size=16 --config.accumulation=1 --workdir gs://BUCKET/runs/hate

After -- comes a command of `safetydpo`, which the image has (Dockerfile). --dry-run prints the
JobSet and does not send it to kubectl. The cluster needs a node pool of that slice and JobSet's
controller, as `xpk cluster create` makes them. When a process of the job is lost all pods are
started again, --restarts times at the most, and go on from the last checkpoint if --workdir is in a
bucket; a wrong setting ends it at once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package

import yaml

from safetydpo_jax.errors import run_main
from safetydpo_jax.pods import Shell, Slice, add_slice, command_of, parse_slice, parser

GRACE_SECONDS = 120  # after SIGTERM: for a step, its checkpoint and the copy in the bucket
WRONG = (1, 2)  # exit codes after which trying again is in vain


def main() -> None:
    """Reads the command line, prints the JobSet and creates it."""
    reader = parser(__doc__ or "")
    add_slice(reader)
    reader.add_argument("--image", required=True, help="made of the Dockerfile")
    reader.add_argument("--namespace", default="default", help="of the cluster (default)")
    reader.add_argument("--service_account", help="of the pods, that may write to the bucket")
    args = reader.parse_args()
    found = job_set(args, parse_slice(args.topology), command_of(args.command))
    text = yaml.safe_dump(found, sort_keys=False)
    Shell(args.dry_run).run("kubectl", "create", "--filename", "-", given=text)
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name={args.name}"
    where = f"--namespace={args.namespace}"
    first = f"{pods},batch.kubernetes.io/job-completion-index=0"
    print(f"to follow the first host:  kubectl logs --follow {where} {first}")
    print(f"to see all:                kubectl get pods {where} {pods}")
    print(f"to end it:                 kubectl delete jobset {args.name} {where}")


def job_set(args: argparse.Namespace, slice_: Slice, command: list[str]) -> dict[str, Any]:
    """The JobSet, https://jobset.sigs.k8s.io: one job, a pod for each of the slice's hosts."""
    labels = slice_.node_labels | ({"cloud.google.com/gke-spot": "true"} if args.spot else {})
    chips = slice_.chips // slice_.hosts
    container = {
        "name": "safetydpo",
        "image": args.image,
        "args": command,
        "ports": [{"containerPort": 8471}, {"containerPort": 8431}],  # between hosts, and metrics
        "resources": {"limits": {"google.com/tpu": chips}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": labels,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    if args.spot:
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]
    codes = {"containerName": "safetydpo", "operator": "In", "values": list(WRONG)}
    job = {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"spec": pod},
    }
    in_vain = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "namespace": args.namespace,
            # One slice for it alone.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": [in_vain]},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


if __name__ == "__main__":
    run_main(main)
