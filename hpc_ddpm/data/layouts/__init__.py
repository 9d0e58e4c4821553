"""The layouts that are known: one object each, in the order in which a source is compared with them."""

from hpc_ddpm.data.layouts.bids import BIDS
from hpc_ddpm.data.layouts.cases import BRATS_RAW, CASES
from hpc_ddpm.data.layouts.chaos import CHAOS
from hpc_ddpm.data.layouts.dataset_json import DECATHLON, NNUNET
from hpc_ddpm.data.layouts.flat import FLAT
from hpc_ddpm.data.layouts.freesurfer import FREESURFER
from hpc_ddpm.data.layouts.table import TABLE
from hpc_ddpm.data.layouts.tree import TREE

LAYOUTS = {
    layout.name: layout for layout in (TABLE, TREE, NNUNET, DECATHLON, BIDS, FREESURFER, BRATS_RAW, CASES, CHAOS, FLAT)
}
