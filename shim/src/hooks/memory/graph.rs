//! Nodes of graphs that allocate. Their memory is taken when the graph is launched, so what a node asks for is checked
//! here, and what graphs hold is asked of the driver.

use super::held;
use crate::{
    abi::{CUgraphNodeParams, CUmemAllocNodeParams, CUresult, NODE_MEM_ALLOC, OUT_OF_MEMORY, Ptr},
    hooks::{hooks, or_original},
};

fn checked(bytes: Option<usize>, real: impl Fn() -> CUresult) -> CUresult {
    or_original(
        || match bytes {
            Some(bytes) if !held().allows_graph_node(bytes as u64) => OUT_OF_MEMORY,
            _ => real(),
        },
        &real,
    )
}

/// The bytes that a node allocates; `None` for a node that does something else.
fn allocated(parameters: *const CUgraphNodeParams) -> Option<usize> {
    // SAFETY: null or the caller's parameters, which have their full size whatever the kind of node.
    let parameters = unsafe { parameters.as_ref() }?;
    (parameters.kind == NODE_MEM_ALLOC).then_some(parameters.allocation.bytes)
}

hooks! {
    cuGraphAddMemAllocNode = c"cuGraphAddMemAllocNode" from 11040, Legacy:
        (node: *mut Ptr, graph: Ptr, dependencies: *const Ptr, count: usize, parameters: *mut CUmemAllocNodeParams)
        |real| {
        // SAFETY: null or the caller's parameters.
        let bytes = unsafe { parameters.as_ref() }.map(|parameters| parameters.bytes);
        checked(bytes, || real(node, graph, dependencies, count, parameters))
    };
    cuGraphAddNode = c"cuGraphAddNode" from 12020, Legacy:
        (node: *mut Ptr, graph: Ptr, dependencies: *const Ptr, count: usize, parameters: *mut CUgraphNodeParams)
        |real| {
        checked(allocated(parameters), || real(node, graph, dependencies, count, parameters))
    };
    cuGraphAddNode_v2 = c"cuGraphAddNode" from 12030, Legacy:
        (node: *mut Ptr, graph: Ptr, dependencies: *const Ptr, edges: Ptr, count: usize,
         parameters: *mut CUgraphNodeParams) |real| {
        checked(allocated(parameters), || real(node, graph, dependencies, edges, count, parameters))
    };
}
