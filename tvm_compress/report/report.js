// Sorts the table of kernels: numbers by data-v, words by their text, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "descending";
      const isNumber = table.tBodies[0].rows[0].cells[column].hasAttribute("data-v");
      const order = isNumber ? (falling ? 1 : -1) : falling || !head.hasAttribute("aria-sort") ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        if (!isNumber) return cell.textContent;
        return cell.dataset.v ? Number(cell.dataset.v) : null;
      };
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        if (a === null || b === null) return (a === null) - (b === null);
        return order * (isNumber ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      });
      table.tBodies[0].append(...rows);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    });
  });
}
