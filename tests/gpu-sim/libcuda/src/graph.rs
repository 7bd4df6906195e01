//! Graphs, and the capture of streams into graphs.
//!
//! A node is one operation and the nodes it comes after. Capturing appends nodes in program order; instantiating sorts
//! topologically, and a launch carries the operations out in that order in one stream.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
};

use crate::{
    abi::{
        CUresult, GraphInstantiateParams, Handle, HostNodeParams, INVALID_VALUE, In, KernelNodeParams,
        LOCATION_DEVICE, MemAllocNodeParams, Memcpy3D, MemsetNodeParams, Out, Outcome,
        STREAM_CAPTURE_INVALIDATED, STREAM_CAPTURE_MERGE, STREAM_CAPTURE_UNJOINED, STREAM_CAPTURE_UNMATCHED,
        STREAM_CAPTURE_UNSUPPORTED, STREAM_CAPTURE_WRONG_THREAD,
    },
    context::Context,
    copy,
    entry::{driver_api, stream_api},
    launch::{self, Callback, Launch, Operation},
    memory, module,
    process::{driver, gpu_index},
    registry::{Registry, handle_of, lock},
    stream::{Kind, Stream, resolve},
};

/// `CUDA_ERROR_STREAM_CAPTURE_ISOLATION`: a dependency on work outside the capture.
pub(crate) const ISOLATION: CUresult = CUresult(905);

/// `CU_STREAM_CAPTURE_MODE_*`.
const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

/// A node's handle.
pub(crate) type NodeId = Handle;

pub(crate) struct Node {
    operation: Operation,
    after: Mutex<BTreeSet<NodeId>>,
}

#[derive(Default)]
pub(crate) struct Graph {
    nodes: Mutex<Vec<Arc<Node>>>,
}

struct Executable {
    operations: Arc<Vec<Operation>>,
    flags: u64,
}

/// Bytes that nodes have allocated. The simulated driver takes them when the node is made, not when its graph is launched,
/// and keeps them to the end.
static GRAPH_MEMORY: AtomicU64 = AtomicU64::new(0);
static GRAPHS: Registry<Graph> = Registry::new();
static NODES: Registry<Node> = Registry::new();
static EXECUTABLES: Registry<Executable> = Registry::new();

impl Graph {
    fn add(&self, operation: Operation, after: BTreeSet<NodeId>) -> NodeId {
        let node = Arc::new(Node { operation, after: Mutex::new(after) });
        lock(&self.nodes).push(Arc::clone(&node));
        NODES.insert(node)
    }

    /// The operations in an order that respects every dependency, insertion order otherwise.
    fn sorted(&self) -> Outcome<Vec<Operation>> {
        let nodes = lock(&self.nodes);
        let mut done = BTreeSet::new();
        let mut operations = Vec::with_capacity(nodes.len());
        let mut waiting: Vec<&Arc<Node>> = nodes.iter().collect();
        while !waiting.is_empty() {
            let before = waiting.len();
            waiting.retain(|node| {
                if lock(&node.after).is_subset(&done) {
                    done.insert(handle_of(node));
                    operations.push(node.operation.clone());
                    false
                } else {
                    true
                }
            });
            if waiting.len() == before {
                return Err(INVALID_VALUE);
            }
        }
        Ok(operations)
    }

    fn ancestors(&self, of: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let nodes: BTreeMap<NodeId, Arc<Node>> =
            lock(&self.nodes).iter().map(|node| (handle_of(node), Arc::clone(node))).collect();
        let mut seen = BTreeSet::new();
        let mut open: Vec<NodeId> = of.iter().copied().collect();
        while let Some(id) = open.pop() {
            if seen.insert(id)
                && let Some(node) = nodes.get(&id)
            {
                open.extend(lock(&node.after).iter());
            }
        }
        seen
    }

    fn destroy(&self) {
        for node in lock(&self.nodes).drain(..) {
            // A node that the program destroyed by itself is gone already.
            let _node = NODES.remove(handle_of(&node));
        }
    }
}

/// An ongoing capture: the graph so far and where each of its streams stands in it.
pub(crate) struct Capture {
    id: u64,
    mode: u32,
    thread: ThreadId,
    origin: Handle,
    graph: Arc<Graph>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    invalid: bool,
    members: BTreeMap<Handle, Member>,
}

struct Member {
    stream: Arc<Stream>,
    tails: BTreeSet<NodeId>,
    /// What the last query of the capture's dependencies pointed to.
    shown: Vec<NodeId>,
}

static CAPTURES: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());
static NEXT_CAPTURE: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

impl Capture {
    fn begin(stream: &Arc<Stream>, mode: u32) -> Outcome {
        if mode > RELAXED {
            return Err(INVALID_VALUE);
        }
        if stream.kind == Kind::Legacy || stream.capture().is_some() {
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        let graph = Arc::new(Graph::default());
        let capture = Arc::new(Self {
            id: NEXT_CAPTURE.fetch_add(1, Ordering::Relaxed),
            mode,
            thread: thread::current().id(),
            origin: handle_of(stream),
            graph,
            state: Mutex::default(),
        });
        capture.enter(stream, BTreeSet::new());
        lock(&CAPTURES).push(capture);
        Ok(())
    }

    fn enter(self: &Arc<Self>, stream: &Arc<Stream>, tails: BTreeSet<NodeId>) {
        let member = Member { stream: Arc::clone(stream), tails, shown: Vec::new() };
        lock(&self.state).members.insert(handle_of(stream), member);
        *lock(&stream.capture) = Some(Arc::clone(self));
    }

    pub(crate) fn invalidate(&self) {
        lock(&self.state).invalid = true;
    }

    /// Appends an operation of a stream to the graph.
    pub(crate) fn record(&self, stream: &Arc<Stream>, operation: Operation) -> Outcome {
        let mut state = lock(&self.state);
        if state.invalid {
            return Err(STREAM_CAPTURE_INVALIDATED);
        }
        let member = state.members.get_mut(&handle_of(stream)).ok_or(STREAM_CAPTURE_UNMATCHED)?;
        let node = self.graph.add(operation, std::mem::take(&mut member.tails));
        member.tails.insert(node);
        Ok(())
    }

    /// The nodes that an event recorded in this stream stands for.
    pub(crate) fn tails(&self, stream: &Arc<Stream>) -> Outcome<Vec<NodeId>> {
        let state = lock(&self.state);
        if state.invalid {
            return Err(STREAM_CAPTURE_INVALIDATED);
        }
        Ok(state
            .members
            .get(&handle_of(stream))
            .into_iter()
            .flat_map(|member| &member.tails)
            .copied()
            .collect())
    }

    /// Makes a stream wait for nodes of this capture, which draws it into the capture.
    pub(crate) fn join(self: &Arc<Self>, stream: &Arc<Stream>, nodes: &[NodeId]) -> Outcome {
        match stream.capture() {
            None => {
                self.enter(stream, nodes.iter().copied().collect());
                Ok(())
            }
            Some(other) if !Arc::ptr_eq(self, &other) => {
                other.invalidate();
                self.invalidate();
                Err(STREAM_CAPTURE_MERGE)
            }
            Some(_) => {
                let mut state = lock(&self.state);
                if let Some(member) = state.members.get_mut(&handle_of(stream)) {
                    member.tails.extend(nodes);
                }
                Ok(())
            }
        }
    }

    /// Ends the capture with the stream that it began in; losing another one only spoils it.
    pub(crate) fn stream_destroyed(&self, stream: &Arc<Stream>) {
        self.invalidate();
        if handle_of(stream) == self.origin {
            lock(&CAPTURES).retain(|capture| capture.id != self.id);
            let state = std::mem::take(&mut *lock(&self.state));
            for member in state.members.values() {
                *lock(&member.stream.capture) = None;
            }
            self.graph.destroy();
        }
    }

    fn end(&self, stream: &Arc<Stream>) -> Outcome<Handle> {
        if handle_of(stream) != self.origin {
            self.invalidate();
            return Err(STREAM_CAPTURE_UNMATCHED);
        }
        if self.mode != RELAXED && self.thread != thread::current().id() {
            self.invalidate();
            return Err(STREAM_CAPTURE_WRONG_THREAD);
        }
        lock(&CAPTURES).retain(|capture| capture.id != self.id);
        let state = std::mem::take(&mut *lock(&self.state));
        for member in state.members.values() {
            *lock(&member.stream.capture) = None;
        }
        let failure = if state.invalid {
            Some(STREAM_CAPTURE_INVALIDATED)
        } else {
            let joined = state
                .members
                .get(&self.origin)
                .map(|member| self.graph.ancestors(&member.tails))
                .unwrap_or_default();
            state
                .members
                .values()
                .any(|member| !member.tails.is_subset(&joined))
                .then_some(STREAM_CAPTURE_UNJOINED)
        };
        if let Some(code) = failure {
            self.graph.destroy();
            return Err(code);
        }
        Ok(GRAPHS.insert(Arc::clone(&self.graph)))
    }
}

/// Refuses a call that is "potentially unsafe" while a capture forbids such calls to this thread.
pub(crate) fn forbid_unsafe() -> Outcome {
    let mode = MODE.get();
    if mode == RELAXED {
        return Ok(());
    }
    let here = thread::current().id();
    let mut refused = false;
    for capture in lock(&CAPTURES).iter() {
        let own = capture.thread == here && capture.mode != RELAXED;
        let others = mode == GLOBAL && capture.mode == GLOBAL;
        if own || others {
            capture.invalidate();
            refused = true;
        }
    }
    if refused { Err(STREAM_CAPTURE_UNSUPPORTED) } else { Ok(()) }
}

/// Refuses to wait for a context in which a stream is capturing.
pub(crate) fn forbid_while_capturing(context: &Context) -> Outcome {
    let mut refused = false;
    for capture in context.streams().iter().filter_map(|stream| stream.capture()) {
        capture.invalidate();
        refused = true;
    }
    if refused { Err(STREAM_CAPTURE_UNSUPPORTED) } else { forbid_unsafe() }
}

fn capture_info(
    stream: &Arc<Stream>,
    status: Out<u32>,
    id: Out<u64>,
    graph: Out<Handle>,
    nodes: Out<*const NodeId>,
    count: Out<usize>,
) -> Outcome {
    let Some(capture) = stream.capture() else {
        id.set_optional(0);
        return status.set(0);
    };
    let mut state = lock(&capture.state);
    id.set_optional(capture.id);
    status.set(if state.invalid { 2 } else { 1 })?;
    // The graph under construction is named by its address; it becomes a handle of its own when the capture ends.
    graph.set_optional(handle_of(&capture.graph));
    if let Some(member) = state.members.get_mut(&handle_of(stream)) {
        member.shown = member.tails.iter().copied().collect();
        nodes.set_optional(member.shown.as_ptr());
        count.set_optional(member.shown.len());
    }
    Ok(())
}

fn update_dependencies(stream: &Arc<Stream>, nodes: In<NodeId>, count: usize, flags: u32) -> Outcome {
    let capture = stream.capture().ok_or(STREAM_CAPTURE_UNMATCHED)?;
    let named: BTreeSet<NodeId> = (0..count).map(|index| nodes.at(index)).collect::<Outcome<_>>()?;
    let mut state = lock(&capture.state);
    let member = state.members.get_mut(&handle_of(stream)).ok_or(STREAM_CAPTURE_UNMATCHED)?;
    // CU_STREAM_ADD_CAPTURE_DEPENDENCIES or CU_STREAM_SET_….
    if flags == 0 {
        member.tails.extend(named);
    } else {
        member.tails = named;
    }
    Ok(())
}

fn add_node(
    out: Out<Handle>,
    graph: Handle,
    after: In<NodeId>,
    count: usize,
    operation: Operation,
) -> Outcome {
    let graph = GRAPHS.get(graph)?;
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    let after = (0..count)
        .map(|index| {
            let node = after.at(index)?;
            NODES.get(node)?;
            Ok(node)
        })
        .collect::<Outcome<_>>()?;
    out.set(graph.add(operation, after))
}

fn kernel_node(
    out: Out<Handle>,
    graph: Handle,
    after: In<NodeId>,
    count: usize,
    params: &KernelNodeParams,
    kernel: Handle,
) -> Outcome {
    let function = module::node_function(params.function, kernel)?;
    let arguments = launch::arguments(&function, params.params, params.extra)?;
    add_node(out, graph, after, count, Operation::Kernel(Launch { function, arguments }))
}

fn list(nodes: &[NodeId], out: Out<Handle>, count: Out<usize>) -> Outcome {
    if out.is_null() {
        return count.set(nodes.len());
    }
    let room = count.get()?;
    for index in 0..room {
        out.set_at(index, nodes.get(index).copied().unwrap_or_default())?;
    }
    count.set(room.min(nodes.len()))
}

fn depend(graph: Handle, from: In<NodeId>, to: In<NodeId>, count: usize) -> Outcome {
    GRAPHS.get(graph)?;
    for index in 0..count {
        let first = from.at(index)?;
        NODES.get(first)?;
        lock(&NODES.get(to.at(index)?)?.after).insert(first);
    }
    Ok(())
}

fn instantiate(out: Out<Handle>, graph: Handle, flags: u64) -> Outcome {
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    let operations = Arc::new(GRAPHS.get(graph)?.sorted()?);
    out.set(EXECUTABLES.insert(Arc::new(Executable { operations, flags })))
}

driver_api! {
    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        let new = mode.get()?;
        if new > RELAXED {
            return Err(INVALID_VALUE);
        }
        mode.set(MODE.replace(new))
    }

    fn cuGraphCreate(out: Out<Handle>, _flags: u32) {
        driver()?;
        out.set(GRAPHS.insert(Arc::default()))
    }

    fn cuGraphDestroy(graph: Handle) {
        GRAPHS.remove(graph)?.destroy();
        Ok(())
    }

    fn cuGraphClone(out: Out<Handle>, original: Handle) {
        let original = GRAPHS.get(original)?;
        let clone = Graph::default();
        let mut renamed = BTreeMap::new();
        let nodes: Vec<Arc<Node>> = lock(&original.nodes).clone();
        for node in &nodes {
            renamed.insert(handle_of(node), clone.add(node.operation.clone(), BTreeSet::new()));
        }
        for node in &nodes {
            let after: BTreeSet<NodeId> =
                lock(&node.after).iter().filter_map(|id| renamed.get(id).copied()).collect();
            if let Some(&id) = renamed.get(&handle_of(node)) {
                *lock(&NODES.get(id)?.after) = after;
            }
        }
        out.set(GRAPHS.insert(Arc::new(clone)))
    }

    fn cuGraphAddKernelNode(out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: In<KernelNodeParams>) {
        kernel_node(out, graph, after, count, &params.get()?, 0)
    }

    fn cuGraphAddKernelNode_v2(out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: In<KernelNodeParams>) {
        let params = params.get()?;
        kernel_node(out, graph, after, count, &params, params.kernel)
    }

    fn cuGraphAddMemcpyNode(
        out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: In<Memcpy3D>, _context: Handle,
    ) {
        add_node(out, graph, after, count, Operation::Copy(copy::copy_3d(params)?))
    }

    fn cuGraphAddMemsetNode(
        out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: In<MemsetNodeParams>, _context: Handle,
    ) {
        add_node(out, graph, after, count, Operation::Fill(copy::node_fill(&params.get()?)?))
    }

    fn cuGraphAddHostNode(out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: In<HostNodeParams>) {
        let params = params.get()?;
        let call = Callback::host(params.function.ok_or(INVALID_VALUE)?, params.argument);
        add_node(out, graph, after, count, Operation::Call(call))
    }

    fn cuGraphAddMemAllocNode(
        out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, params: *mut MemAllocNodeParams,
    ) {
        let mut wanted = In::from_raw(params.cast_const()).get()?;
        if wanted.pool.location.kind != LOCATION_DEVICE || wanted.bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let gpu = gpu_index(wanted.pool.location.id)?;
        wanted.address = memory::allocate(memory::Kind::Device(gpu), wanted.bytes as u64, 0, gpu, 0, 0)?;
        GRAPH_MEMORY.fetch_add(wanted.bytes as u64, Ordering::Relaxed);
        Out::from_raw(params).set(wanted)?;
        add_node(out, graph, after, count, Operation::Nothing)
    }

    fn cuDeviceGetGraphMemAttribute(device: i32, attribute: u32, out: Out<u64>) {
        gpu_index(device)?;
        // CU_GRAPH_MEM_ATTR_{USED,RESERVED}_MEM_{CURRENT,HIGH}.
        if attribute > 3 {
            return Err(INVALID_VALUE);
        }
        out.set(GRAPH_MEMORY.load(Ordering::Relaxed))
    }

    fn cuGraphAddEmptyNode(out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize) {
        add_node(out, graph, after, count, Operation::Nothing)
    }

    fn cuGraphAddChildGraphNode(out: Out<Handle>, graph: Handle, after: In<NodeId>, count: usize, child: Handle) {
        let operations = GRAPHS.get(child)?.sorted()?;
        add_node(out, graph, after, count, Operation::Graph(Arc::new(operations)))
    }

    fn cuGraphGetNodes(graph: Handle, out: Out<Handle>, count: Out<usize>) {
        let nodes: Vec<NodeId> = lock(&GRAPHS.get(graph)?.nodes).iter().map(handle_of).collect();
        list(&nodes, out, count)
    }

    fn cuGraphGetRootNodes(graph: Handle, out: Out<Handle>, count: Out<usize>) {
        let graph = GRAPHS.get(graph)?;
        let roots: Vec<NodeId> =
            lock(&graph.nodes).iter().filter(|node| lock(&node.after).is_empty()).map(handle_of).collect();
        list(&roots, out, count)
    }

    fn cuGraphNodeGetType(node: Handle, kind: Out<u32>) {
        // CU_GRAPH_NODE_TYPE_*.
        kind.set(match NODES.get(node)?.operation {
            Operation::Kernel(_) => 0,
            Operation::Copy(_) => 1,
            Operation::Fill(_) => 2,
            Operation::Call(_) => 3,
            Operation::Graph(_) => 4,
            Operation::Nothing | Operation::Prefetch { .. } => 5,
            Operation::Record(_) => 7,
            Operation::Free(_) => 11,
            Operation::WriteValue { .. } | Operation::WaitValue { .. } => 12,
        })
    }

    fn cuGraphAddDependencies(graph: Handle, from: In<NodeId>, to: In<NodeId>, count: usize) {
        depend(graph, from, to, count)
    }

    fn cuGraphAddDependencies_v2(graph: Handle, from: In<NodeId>, to: In<NodeId>, _edges: usize, count: usize) {
        depend(graph, from, to, count)
    }

    fn cuGraphInstantiate(out: Out<Handle>, graph: Handle, _error_node: usize, _log: usize, _room: usize) {
        instantiate(out, graph, 0)
    }

    fn cuGraphInstantiate_v2(out: Out<Handle>, graph: Handle, _error_node: usize, _log: usize, _room: usize) {
        instantiate(out, graph, 0)
    }

    fn cuGraphInstantiateWithFlags(out: Out<Handle>, graph: Handle, flags: u64) {
        instantiate(out, graph, flags)
    }

    fn cuGraphExecGetFlags(executable: Handle, flags: Out<u64>) {
        flags.set(EXECUTABLES.get(executable)?.flags)
    }

    fn cuGraphExecDestroy(executable: Handle) {
        EXECUTABLES.remove(executable).map(drop)
    }
}

stream_api! {
    fn cuGraphInstantiateWithParams | cuGraphInstantiateWithParams_ptsz(
        _flavour; out: Out<Handle>, graph: Handle, params: Out<GraphInstantiateParams>,
    ) {
        let mut given = params.get()?;
        instantiate(out, graph, given.flags)?;
        given.error_node = 0;
        given.result = 0;
        params.set(given)
    }

    fn cuGraphUpload | cuGraphUpload_ptsz(flavour; executable: Handle, stream: Handle) {
        EXECUTABLES.get(executable)?;
        resolve(stream, flavour).map(drop)
    }

    fn cuGraphLaunch | cuGraphLaunch_ptsz(flavour; executable: Handle, stream: Handle) {
        let operations = Arc::clone(&EXECUTABLES.get(executable)?.operations);
        resolve(stream, flavour)?.add(Operation::Graph(operations)).map(drop)
    }

    fn cuStreamBeginCapture | cuStreamBeginCapture_ptsz(flavour; stream: Handle) {
        Capture::begin(&resolve(stream, flavour)?, GLOBAL)
    }

    fn cuStreamBeginCapture_v2 | cuStreamBeginCapture_v2_ptsz(flavour; stream: Handle, mode: u32) {
        Capture::begin(&resolve(stream, flavour)?, mode)
    }

    fn cuStreamEndCapture | cuStreamEndCapture_ptsz(flavour; stream: Handle, graph: Out<Handle>) {
        let stream = resolve(stream, flavour)?;
        graph.set(0)?;
        let capture = stream.capture().ok_or(STREAM_CAPTURE_UNMATCHED)?;
        graph.set(capture.end(&stream)?)
    }

    fn cuStreamIsCapturing | cuStreamIsCapturing_ptsz(flavour; stream: Handle, status: Out<u32>) {
        let none = || Out::from_raw(std::ptr::null_mut());
        capture_info(
            &resolve(stream, flavour)?,
            status,
            Out::from_raw(std::ptr::null_mut()),
            none(),
            Out::from_raw(std::ptr::null_mut()),
            none(),
        )
    }

    fn cuStreamGetCaptureInfo | cuStreamGetCaptureInfo_ptsz(flavour; stream: Handle, status: Out<u32>, id: Out<u64>) {
        let none = || Out::from_raw(std::ptr::null_mut());
        capture_info(&resolve(stream, flavour)?, status, id, none(), Out::from_raw(std::ptr::null_mut()), none())
    }

    fn cuStreamGetCaptureInfo_v2 | cuStreamGetCaptureInfo_v2_ptsz(
        flavour; stream: Handle, status: Out<u32>, id: Out<u64>, graph: Out<Handle>, nodes: Out<*const NodeId>,
        count: Out<usize>,
    ) {
        capture_info(&resolve(stream, flavour)?, status, id, graph, nodes, count)
    }

    fn cuStreamGetCaptureInfo_v3 | cuStreamGetCaptureInfo_v3_ptsz(
        flavour; stream: Handle, status: Out<u32>, id: Out<u64>, graph: Out<Handle>, nodes: Out<*const NodeId>,
        edges: Out<usize>, count: Out<usize>,
    ) {
        edges.set_optional(0);
        capture_info(&resolve(stream, flavour)?, status, id, graph, nodes, count)
    }

    fn cuStreamUpdateCaptureDependencies | cuStreamUpdateCaptureDependencies_ptsz(
        flavour; stream: Handle, nodes: In<NodeId>, count: usize, flags: u32,
    ) {
        update_dependencies(&resolve(stream, flavour)?, nodes, count, flags)
    }

    fn cuStreamUpdateCaptureDependencies_v2 | cuStreamUpdateCaptureDependencies_v2_ptsz(
        flavour; stream: Handle, nodes: In<NodeId>, _edges: usize, count: usize, flags: u32,
    ) {
        update_dependencies(&resolve(stream, flavour)?, nodes, count, flags)
    }
}
