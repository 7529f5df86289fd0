"""What a user writes into ``@task(task_config=...)`` and ``backend=...``.

The job classes equal those of ``flytekitplugins.kfpytorch`` 1.16: plain dataclasses with the same names, defaults
and positional order; ``backend`` comes last. Nothing is checked or changed here: kfpytorch_ray.checks reads a config,
and what depends on the cluster goes into the plan. Agents import this module, so it does without flytekit.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from flyteidl.plugins.kubeflow import common_pb2 as kubeflow_common

if TYPE_CHECKING:
    from flytekit import PodTemplate, Resources

DEFAULT_TIMEOUT_S = 900
"""Upstream's default for both rendezvous time-outs: nodes may still have to be started and images pulled."""

DEFAULT_ARRIVAL_WINDOW_S = 10
"""Enough for agents that start together on unequal machines; torch elastic waits 30 for its last call."""

DEFAULT_CARRIED_ENVIRONMENT = (
    "FLYTE_*",
    "_F_*",
    "OMP_*",
    "MKL_*",
    "OPENBLAS_*",
    "KMP_*",
    "TORCH*",
    "PYTORCH_*",
    "NCCL_*",
    "GLOO_*",
    "UCX_*",
    "CUDA_*",
    "CUBLAS_*",
    "CUDNN_*",
    "NVIDIA_TF32_OVERRIDE",
    "HF_*",
    "HUGGINGFACE_*",
    "TRANSFORMERS_*",
    "TOKENIZERS_PARALLELISM",
    "WANDB_*",
    "MLFLOW_*",
    "PYTHONHASHSEED",
    "PYTHONUNBUFFERED",
    "PYTHONWARNINGS",
    "TZ",
)
"""Variables of the driver that torchrun's workers would inherit and that mean the same on another machine."""

DEFAULT_WORKING_DIR_EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "*.pyc",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "node_modules",
    "*.egg-info",
    "build",
    "dist",
    "script_mode.tar.gz",
    "fast*.tar.gz",
)
"""What is not sent to other nodes: version control, environments, caches, and Flyte's own code archives."""


DEFAULT_MAX_WORKING_DIR_BYTES = 100 * 2**20
"""A project's code is far smaller; the job API takes no more."""

LOGS = ("rank0", "all", "none")
"""Whose lines a driver may print; the default first."""

DEFAULT_MAX_LOG_BYTES = 64 * 2**20
"""Hundreds of thousands of lines: far more than anybody reads, and little beside a checkpoint."""

ON_INTERRUPT = ("ask", "stop", "detach")
"""What an interruption may do to a remote run; the default first."""

DEFAULT_RETENTION_S = 7 * 24 * 3600.0
"""A week: long enough to look for a run after a holiday, short enough for a bucket."""


class RestartPolicy(Enum):
    """When a replica is restarted."""

    ALWAYS = kubeflow_common.RESTART_POLICY_ALWAYS
    FAILURE = kubeflow_common.RESTART_POLICY_ON_FAILURE
    NEVER = kubeflow_common.RESTART_POLICY_NEVER


class CleanPodPolicy(Enum):
    """What becomes of the pods of a PyTorchJob that has ended."""

    NONE = kubeflow_common.CLEANPOD_POLICY_NONE
    ALL = kubeflow_common.CLEANPOD_POLICY_ALL
    RUNNING = kubeflow_common.CLEANPOD_POLICY_RUNNING


@dataclass
class RunPolicy:
    """How long a job may run, how often it is tried, and what is cleaned up afterwards.

    Args:
        clean_pod_policy: Pods to remove when the job has ended. None leaves it to the operator.
        ttl_seconds_after_finished: Seconds after which an ended job is removed. None: never.
        active_deadline_seconds: Seconds that the job may run. None, and 0: no limit.
        backoff_limit: Restarts before the job counts as failed. None leaves it to the operator.
    """

    clean_pod_policy: CleanPodPolicy | None = None
    ttl_seconds_after_finished: int | None = None
    active_deadline_seconds: int | None = None
    backoff_limit: int | None = None


@dataclass
class Worker:
    """The worker replicas of a ``PyTorch`` job.

    Args:
        image: Container image. None: the task's.
        requests: Resources of one replica. None: the task's.
        limits: Resource limits of one replica. None: the task's.
        replicas: Number of workers beside the master.
        restart_policy: When a replica is restarted. None leaves it to the operator.
    """

    image: str | None = None
    requests: Resources | None = None
    limits: Resources | None = None
    replicas: int | None = None
    restart_policy: RestartPolicy | None = None


@dataclass
class Master:
    """The master of a ``PyTorch`` job: always one replica, which is rank 0. Fields as in ``Worker``."""

    image: str | None = None
    requests: Resources | None = None
    limits: Resources | None = None
    restart_policy: RestartPolicy | None = None


@runtime_checkable
class BackendOptions(Protocol):
    """What ``backend=`` takes beside a name: an object that says which backend it is for."""

    name: ClassVar[str]


@dataclass(kw_only=True)
class CallOptions:
    """What concerns a call that is made in processes elsewhere.

    Args:
        env: Environment variables of the workers; they win over the task's ``environment`` and the driver's. Not shown
            by ``repr()``: they may be secrets.
        carried_environment: Shell patterns of the driver's variables that workers get.
        working_dir: Folder that is sent to the cluster so that workers can import the user's modules. ``""``: send
            nothing. None: as the backend says.
        excludes: gitignore patterns that are left out of ``working_dir``.
        stop_grace_s: Seconds between SIGTERM and SIGKILL when workers are stopped.
    """

    env: dict[str, str] = field(default_factory=dict, repr=False)
    carried_environment: tuple[str, ...] = DEFAULT_CARRIED_ENVIRONMENT
    working_dir: str | None = None
    excludes: tuple[str, ...] = DEFAULT_WORKING_DIR_EXCLUDES
    stop_grace_s: float = 5.0


@dataclass(kw_only=True)
class RayRunOptions(CallOptions):
    """What concerns a run on Ray, whoever made the Ray: shared by ``RayBackend`` and ``KubeRayBackend``.

    Args:
        runtime_env: Ray's runtime environment of the job: ``pip``, ``py_modules``, ``env_vars`` and the rest, in Ray's
            words, but for ``working_dir`` and ``excludes``. Ray's dashboard shows it: secrets belong into ``env``.
        preload: Modules that the fork server imports before the first worker, besides torch and flytekit; such as
            ``("transformers",)``. One that starts threads or uses a GPU while it is imported is refused.
        max_node_failures: Lost agents and nodes after which the task fails, counted apart from ``max_restarts``.
            Nodes that Ray drains (pre-emption) do not count.
        silence_timeout_s: Seconds without an answer after which a node counts as lost. A node that hears nothing from
            the driver for as long ends its workers itself. Ray alone takes 65 s to notice.
        checkpoint_grace_s: Seconds that workers which ask ``kfpytorch_ray.stop_requested()`` have to write a
            checkpoint and leave, when a node is drained or more nodes arrive. Workers that never ask get none.
        grow_cooldown_s: Shortest time that a round runs before it is ended because more nodes have arrived.
        hang_timeout_s: Seconds without ``kfpytorch_ray.progress()`` or a checkpoint by any rank after which the round
            fails, with the stacks of all ranks. None: no limit.
        decks: Whose flytekit decks the task shows: ``"rank0"``, or ``"all"`` ranks', named by rank, also of those that
            failed or were stopped. They are kept in files on their way, so they cost disk and time.
        logs: Whose lines the driver prints, as ``[rank 3 | node 1] ...``: ``"rank0"``, ``"all"`` or ``"none"``. The
            last lines of ranks that fail are printed in any case.
        max_log_bytes: Largest file of what one rank prints in one round. Of more, the beginning (half of it) and the
            end (at least a quarter) are kept.
        log_folder: Folder (any fsspec URI that the nodes reach) in which these files are kept, in a folder of the
            launch's own: ``round-0/rank-3.log``. ``""``: nowhere. None: beside the raw outputs of a Flyte execution,
            under ``outputs/<run id>/logs`` in the storage of a remote run, else nowhere.
        **options: As in ``CallOptions``.
    """

    preload: tuple[str, ...] = ()
    max_node_failures: int = 3
    silence_timeout_s: float = 15.0
    checkpoint_grace_s: float = 30.0
    grow_cooldown_s: float = 60.0
    hang_timeout_s: float | None = None
    decks: str = "rank0"
    logs: str = LOGS[0]
    max_log_bytes: int = DEFAULT_MAX_LOG_BYTES
    log_folder: str | None = None
    runtime_env: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(kw_only=True)
class StoredRunOptions(CallOptions):
    """What concerns a run whose cluster is elsewhere: its call goes there, and its results come back, by a storage.

    Args:
        storage: Folder that this machine and the cluster both reach, as an fsspec URI (``"s3://bucket/prefix"``, or a
            local path on a disk that they share). None: the variable ``KFPYTORCH_RAY_STORAGE``. Whoever can write
            there can run code here and there.
        max_working_dir_bytes: Largest ``working_dir`` that is sent. More than 100 MiB Ray's job API does not take.
        on_interrupt: What Ctrl-C and SIGTERM do to a run that this process waits for: ``"stop"`` stops it,
            ``"detach"`` leaves it running, ``"ask"`` asks where there is a terminal and stops it elsewhere.
        lease_s: Seconds without a sign of life of this process after which the run stops itself. None: it runs on
            without this process, until somebody attaches to it again.
        retention_s: Seconds after which ``kfpytorch-ray gc`` may remove what the run has left in ``storage``.
        reconnect_timeout_s: Seconds for which a lost connection to the cluster is tried again before it is an error.
        **options: As in ``CallOptions``.
    """

    storage: str | None = None
    max_working_dir_bytes: int = DEFAULT_MAX_WORKING_DIR_BYTES
    on_interrupt: str = "ask"
    lease_s: float | None = None
    retention_s: float = DEFAULT_RETENTION_S
    reconnect_timeout_s: float = 600.0


@dataclass(kw_only=True)
class KubernetesOptions(StoredRunOptions):
    """What concerns pods that this process has an operator make, without Flyte: in a script, a notebook, a local run.

    Args:
        image: Image of all pods, with the packages of this machine in the same versions.
        namespace: Where the custom resource is created. None: the context's, else ``"default"``.
        context: Of the kubeconfig. None: its current one.
        kubeconfig: Path of the kubeconfig. None: ``KUBECONFIG``, else ``~/.kube/config``, else the service account of
            the pod that this process is in.
        service_account: Of all pods. None: the namespace's default.
        requests: Resources of one node's pod where there is no task that says so, as in ``launch()``.
        limits: Its limits likewise.
        gpu_resource: What the cluster calls a GPU.
        labels: Of the custom resource: queues of Kueue, Volcano, YuniKorn.
        annotations: Likewise.
        ready_timeout_s: Seconds within which the run has to begin; pods wait for nodes and pull images.
        spec: What else the custom resource's ``spec`` holds, in the operator's own words; laid over ours, dict by dict.
        **options: As in ``StoredRunOptions``.
    """

    image: str | None = None
    namespace: str | None = None
    context: str | None = None
    kubeconfig: str | None = None
    service_account: str | None = None
    requests: Resources | None = None
    limits: Resources | None = None
    gpu_resource: str = "nvidia.com/gpu"
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 1800.0
    spec: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class KubeflowBackend(KubernetesOptions):
    """Run as upstream does: PyTorchJob pods on Flyte, torch elastic in this process when run elsewhere.

    With an ``image`` (or a ``namespace``, a ``context``) a run outside Flyte is a PyTorchJob, too: this process
    creates it, follows it, and takes the result from ``storage``; the call travels there as well. If this process
    ends, the run goes on, or stops after ``lease_s``.

    The task's requests and limits are those of one pod. ``working_dir=None`` sends the current directory. Under Flyte
    no option has an effect: it creates the PyTorchJob itself, as upstream registers it.

    Args:
        **options: As in ``KubernetesOptions``.
    """

    name: ClassVar[str] = "kubeflow"

    @property
    def creates_job(self) -> bool:
        """Whether a run outside Flyte is a PyTorchJob."""
        return any(value is not None for value in (self.image, self.namespace, self.context))


@dataclass
class RayBackend(StoredRunOptions, RayRunOptions):
    """Run on a Ray that can be reached: one elastic agent actor per node.

    ``working_dir=None`` sends the current directory, unless the Ray job already has one. Only a launch that joins the
    cluster itself can send it; under a ``ray.init()`` of the user's, its ``runtime_env`` does. On a Ray that runs on
    this machine only, nothing is sent and the driver's ``sys.path`` is used.

    Args:
        address: Which Ray. None: the one that is initialised, else ``RAY_ADDRESS``, else one started here.
            ``"local"``: one that this process started or starts now; ``"auto"`` or ``"HOST:PORT"`` (of the GCS): a
            cluster that this machine belongs to; ``"http://HOST:8265"`` or ``"https://..."`` (of the job API, Ray's
            dashboard): a cluster that is elsewhere, where the launch is submitted as a Ray job. That needs ``storage``.
        resources_per_node: Ray resources of one node, for example ``{"CPU": 16, "GPU": 8, "memory": 2**36}``
            (memory in bytes; any custom resource). None: the task's requests and limits, else one CPU per worker.
        autoscaling: Whether the cluster may still grow. Then demand that no present node could hold is waited for,
            until the join timeout, instead of being refused at once.
        headers: HTTP headers of every request to the job API. Ray's own token needs none: ``RAY_AUTH_TOKEN``, or the
            file that ``RAY_AUTH_TOKEN_PATH`` names, is sent where ``RAY_AUTH_MODE=token``. For a remote address only.
        verify: Whether the server's TLS certificate is verified, or the file or folder of certificates to trust. For a
            remote address only.
        keep_warm_s: Seconds for which agents and their nodes are kept after a launch, for the next one of this process
            with the same nodes, workers, environment and ``preload``: that starts in a tenth of a second. Given back
            sooner when somebody waits for them. Not for a remote address, whose driver ends with its run.
        **options: As in ``StoredRunOptions``, which are for a remote address only, and in ``RayRunOptions``.
    """

    name: ClassVar[str] = "ray"

    address: str | None = None
    resources_per_node: dict[str, float] | None = None
    autoscaling: bool = False
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    verify: bool | str = True
    keep_warm_s: float = 0.0


@dataclass(kw_only=True)
class KubeRayBackend(KubernetesOptions, RayRunOptions):
    """Run on a Ray cluster that KubeRay makes for the task.

    Under Flyte (1.14 or later) its ``ray`` plugin asks KubeRay for it. Elsewhere, in a script, a notebook, a local
    execution or by ``launch()``, this process does: it creates a RayJob in ``namespace``, follows it, and takes the
    result from ``storage``; the call travels there, too. If this process ends, the run goes on, or stops after
    ``lease_s``.

    The task's requests and limits are those of one Ray worker pod, in which one node's workers run. The driver runs on
    the head pod, which has no GPU and takes no workers. ``working_dir=None`` sends the current directory; under Flyte
    fast registration's code, and nothing where the code is in the image.

    Args:
        head_requests: Resources of the head pod. None: 1 CPU and 4Gi.
        head_limits: Limits of the head pod. None: what it requests.
        head_pod_template: What else the head pod has; its primary container is Ray's.
        worker_pod_template: What else worker pods have: node selectors, tolerations, volumes, labels, ...; the primary
            container is Ray's, and has to be the first. Sidecars and init containers of these two are for RayJobs
            without Flyte, which would drop them. ``@task(pod_template=...)`` shapes all pods alike; of the pod that
            submits the driver without Flyte, where it may run and pull, its security context, labels and annotations,
            all as the head's, ``head_pod_template`` included.
        head_start_params: Parameters of ``ray start`` on the head, without dashes.
        worker_start_params: Parameters of ``ray start`` on worker pods.
        idle_timeout_s: Seconds after which Ray's autoscaler gives an idle node of a range back. None: its default.
        cluster: Name of a RayCluster in ``namespace`` that is there already and is used instead of a new one.
        ray_version: Of the image. None: of the ray that is installed here.
        submission_mode: Who submits the driver: ``"K8sJobMode"`` a pod of its own, ``"SidecarMode"`` a container of the
            head pod (KubeRay 1.5), ``"HTTPMode"`` the operator.
        **options: As in ``RayRunOptions``, and in ``KubernetesOptions``: without Flyte ``image`` is needed, ``labels``
            and ``annotations`` are copied to the cluster by KubeRay, and ``spec`` is the RayJob's, for
            ``deletionStrategy``, ``rayClusterSpec: {autoscalerOptions, authOptions, gcsFaultToleranceOptions}`` and
            whatever comes. Under Flyte, which takes the task's own image and creates the RayJob itself, these and
            ``cluster``, ``ray_version`` and ``submission_mode`` have no effect.
    """

    name: ClassVar[str] = "kuberay"

    head_requests: Resources | None = None
    head_limits: Resources | None = None
    head_pod_template: PodTemplate | None = None
    worker_pod_template: PodTemplate | None = None
    head_start_params: dict[str, str] = field(default_factory=dict)
    worker_start_params: dict[str, str] = field(default_factory=dict)
    idle_timeout_s: int | None = None
    cluster: str | None = None
    ray_version: str | None = None
    submission_mode: str = "K8sJobMode"


@dataclass
class PyTorch:
    """A distributed job with one process per replica: one master and ``worker.replicas`` workers.

    Args:
        master: The master replica, rank 0.
        worker: The worker replicas.
        run_policy: Deadline, restarts and clean-up.
        num_workers: Deprecated spelling of ``worker.replicas``.
        increase_shared_mem: Mount a memory-backed volume at /dev/shm by a pod template, so that data loaders do not
            run out of shared memory. ``@task(shared_memory=...)`` wins over it.
        backend: A backend's name or its options object. None: see kfpytorch_ray.backends.
    """

    master: Master = field(default_factory=Master)
    worker: Worker = field(default_factory=Worker)
    run_policy: RunPolicy | None = None
    num_workers: int | None = None
    increase_shared_mem: bool = True
    backend: str | BackendOptions | None = None

    def __post_init__(self) -> None:
        _have_tasks_registered()


@dataclass
class Elastic:
    """A torch elastic job, as by ``torchrun``.

    Args:
        nnodes: Number of nodes, or a range ``"MIN:MAX"``.
        nproc_per_node: Workers on each node.
        start_method: ``"spawn"`` or ``"fork"``; on Ray also ``"forkserver"``. Ray workers always come from a fork
            server, which gives what ``spawn`` promises.
        monitor_interval: Seconds between two looks at the workers. On Ray an upper bound: ends are noticed at once.
        max_restarts: Restarts of the whole worker group before the task fails.
        rdzv_configs: Rendezvous settings of torch elastic, in seconds. On Ray ``join_timeout`` (else ``timeout``)
            bounds the wait for nodes, and ``last_call_timeout`` (10) the wait for more of a range once the fewest
            are there and others are on their way; other keys are said to have no effect.
        increase_shared_mem: As in ``PyTorch``.
        run_policy: Deadline, restarts and clean-up.
        backend: A backend's name or its options object. None: see kfpytorch_ray.backends.
    """

    nnodes: int | str = 1
    nproc_per_node: int = 1
    start_method: str = "spawn"
    monitor_interval: int = 5
    max_restarts: int = 0
    rdzv_configs: dict[str, Any] = field(
        default_factory=lambda: {"timeout": DEFAULT_TIMEOUT_S, "join_timeout": DEFAULT_TIMEOUT_S}
    )
    increase_shared_mem: bool = True
    run_policy: RunPolicy | None = None
    backend: str | BackendOptions | None = None

    def __post_init__(self) -> None:
        _have_tasks_registered()


def _have_tasks_registered() -> None:
    """Whoever has made a config finds its task class: flytekit's import may have left it out (kfpytorch_ray.task).

    By name, for imports run down only.
    """
    importlib.import_module("kfpytorch_ray.task_classes")
