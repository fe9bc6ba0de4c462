"""Every rule module, imported: this fills the table."""

import shardc.compiler.rules.checks
import shardc.compiler.rules.ops.attention
import shardc.compiler.rules.ops.creation
import shardc.compiler.rules.ops.embedding
import shardc.compiler.rules.ops.images.conv
import shardc.compiler.rules.ops.images.pool
import shardc.compiler.rules.ops.images.resample
import shardc.compiler.rules.ops.index
import shardc.compiler.rules.ops.losses.ctc
import shardc.compiler.rules.ops.losses.nll
import shardc.compiler.rules.ops.losses.pointwise_loss
import shardc.compiler.rules.ops.lstsq
import shardc.compiler.rules.ops.matmul
import shardc.compiler.rules.ops.norms.batch_norm
import shardc.compiler.rules.ops.norms.group_norm
import shardc.compiler.rules.ops.norms.layer_norm
import shardc.compiler.rules.ops.pointwise
import shardc.compiler.rules.ops.random.bits
import shardc.compiler.rules.ops.reductions.moment
import shardc.compiler.rules.ops.reductions.reduce
import shardc.compiler.rules.ops.reductions.softmax
import shardc.compiler.rules.ops.slice
import shardc.compiler.rules.ops.sort
import shardc.compiler.rules.ops.view  # noqa: F401
